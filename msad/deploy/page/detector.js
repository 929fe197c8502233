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

/** Fetch a file and tell how much of it has come. */
async function fetchBytes(name, tell = () => {}) {
  const response = await fetch(new URL(name, import.meta.url)).catch(() => null);
  if (!response) throw new Error(`${name} did not come: check the connection to the server, and load the page again.`);
  if (!response.ok) throw new Error(`${name} did not come, the server answers ${response.status}: put it back.`);
  const parts = [];
  const reader = response.body.getReader();
  for (let part; !(part = await reader.read()).done; ) {
    parts.push(part.value);
    tell(part.value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

export class Detector {
  #worker;
  #waiting = new Map();
  #count = 0;
  #broken = "";

  /** Fetch runtime and network and open them; `tell(done, all)` hears of the bytes that have come. */
  static async load(tell = () => {}) {
    const detector = new Detector();
    detector.#worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    detector.#worker.onmessage = ({ data }) => detector.#hear(data);
    detector.#worker.onerror = () => detector.#fail("The detector did not start: load the page again, in a current browser.");
    const description = JSON.parse(new TextDecoder().decode(await fetchBytes("detector.json")));
    let done = 0;
    const count = (bytes) => tell((done += bytes), description.bytes);
    // Fetched here, since Jupyter forbids the workers that it serves to do so.
    const names = ["onnxruntime/ort-wasm-simd-threaded.wasm", "model.onnx"];
    const [wasm, model] = await Promise.all(names.map((name) => fetchBytes(name, count)));
    const { threads } = await detector.#ask({ files: { description, wasm, model } }, [wasm.buffer, model.buffer]);
    return Object.assign(detector, { about: description, threads });
  }

  /**
   * Detect in a picture file or an ImageBitmap, which is used up: `width` and `height` (pixels), `found`, best first,
   * each with `box` (x0, y0, x1, y1, pixels), `score` and `label` (its place in `about.class_names`), and `ms` of each
   * step. `about` is what detector.json says, `threads` how many compute.
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
    return this.#ask({ source }, source instanceof ImageBitmap ? [source] : []);
  }

  #ask(message, transfer) {
    return new Promise((resolve, reject) => {
      if (this.#broken) throw new Error(this.#broken);
      this.#waiting.set(++this.#count, { resolve, reject });
      this.#worker.postMessage({ id: this.#count, ...message }, transfer);
    });
  }

  #hear({ id, answer, error }) {
    const { resolve, reject } = this.#waiting.get(id);
    this.#waiting.delete(id);
    error ? reject(new Error(error)) : resolve(answer);
  }

  #fail(sentence) {
    this.#broken = sentence;
    for (const { reject } of this.#waiting.values()) reject(new Error(sentence));
    this.#waiting.clear();
  }
}
