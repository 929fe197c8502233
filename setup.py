"The metadata of settings.ini, for setuptools."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

settings = ConfigParser(delimiters=["="])
settings.read(Path(__file__).parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]
EXTRAS = ("export", "film", "geo", "openvino", "pretrained")
extras = {name: settings[f"{name}_requirements"].split() for name in EXTRAS}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"].upper(),
    keywords=settings["keywords"],
    packages=find_packages(include=["msad", "msad.*"]),
    package_data={"msad.deploy": ["page/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require={
        **extras,
        "dev": [*settings["dev_requirements"].split(), *(package for extra in extras.values() for package in extra)],
    },
    entry_points={"console_scripts": ["msad = msad.cli:main"]},
)
