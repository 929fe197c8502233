// A detector for a page of your own:
//
//   import { Detector } from "./detector.js";
//   const detector = await Detector.load();
//   const { found } = await detector.detect(file);

export const MAX_SIDE = 10_000; // pixels of a photograph; shrunk more than that, it shows the network nothing

/** Measure a picture file without decoding it: width and height, upright; nothing if the browser cannot tell. */
async function measure(file) {
  const address = URL.createObjectURL(file);
  const image = new Image();
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject, src: address }));
    return [image.naturalWidth, image.naturalHeight];
  } catch {
    return null;
  } finally {
    URL.revokeObjectURL(address);
  }
}

export class Detector {
  #worker;
  #waiting = new Map();
  #count = 0;

  /** Fetch runtime and network and open them; `tell(done, all)` hears of the bytes that have come. */
  static async load(tell = () => {}) {
    const detector = new Detector();
    // Through a blob, since Jupyter forbids the workers that it serves to read further files.
    const start = new Blob([`import ${JSON.stringify(new URL("worker.js", import.meta.url).href)};`], { type: "text/javascript" });
    detector.#worker = new Worker(URL.createObjectURL(start), { type: "module" });
    detector.#worker.onmessage = ({ data }) => detector.#hear(data);
    detector.#worker.onerror = () => detector.#fail("The detector did not start: load the page again, in a current browser.");
    Object.assign(detector, await detector.#ask({ tell }));
    return detector; // with `about`, what detector.json says, and `threads`
  }

  /**
   * Detect in a picture file or an ImageBitmap, which is used up: `width` and `height` (pixels), `found`, best first,
   * each with `box` (x0, y0, x1, y1, pixels), `score` and `label` (its place in `about.class_names`), and `ms`.
   * Fails with one sentence for what is no photograph.
   */
  async detect(source) {
    const size = source instanceof Blob ? await measure(source) : null;
    if (size && Math.max(...size) > MAX_SIDE) {
      const [width, height, most] = [...size, MAX_SIDE].map((side) => side.toLocaleString("en"));
      throw new Error(
        `${source.name} has ${width} × ${height} pixels and this page takes ${most} a side: cut it into parts, or use "msad predict".`,
      );
    }
    return this.#ask({ source, transfer: source instanceof ImageBitmap ? [source] : [] });
  }

  #ask({ source, tell, transfer = [] }) {
    return new Promise((resolve, reject) => {
      this.#waiting.set(++this.#count, { resolve, reject, tell });
      this.#worker.postMessage({ id: this.#count, source }, transfer);
    });
  }

  #hear({ id, answer, error, done, all }) {
    const { resolve, reject, tell } = this.#waiting.get(id);
    if (done) return tell(done, all);
    this.#waiting.delete(id);
    error ? reject(new Error(error)) : resolve(answer);
  }

  #fail(sentence) {
    for (const { reject } of this.#waiting.values()) reject(new Error(sentence));
    this.#waiting.clear();
  }
}
