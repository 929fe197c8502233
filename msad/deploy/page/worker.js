// The detector, beside the page: decodes photographs, resizes them, and runs the network in WebAssembly.

import { InferenceSession, Tensor, env } from "./onnxruntime/ort.wasm.bundle.min.js";
import { Resizer, resizedSize } from "./resize.js";

const MAX_THREADS = 4;
const BAND = 2 ** 20; // pixels that are read at a time

let about, session;

/** Open the network from the bytes of its file and of the runtime's; returns the threads that compute. */
async function load({ description, wasm, model }) {
  about = description;
  const threads = self.crossOriginIsolated ? Math.min(navigator.hardwareConcurrency, MAX_THREADS) : 1;
  Object.assign(env.wasm, { wasmBinary: wasm, numThreads: threads });
  session = await InferenceSession.create(model, { executionProviders: ["wasm"], logSeverityLevel: 3 });
  return { threads };
}

/** Tell in a sentence why a file is no photograph. */
async function refusal(file) {
  const start = new Uint8Array(await file.slice(0, 12).arrayBuffer());
  const text = String.fromCharCode(...start);
  if (/^....ftyp(hei|hev|mif1|msf1)/s.test(text)) return `${file.name} is HEIC, which this browser does not read: save it as JPEG.`;
  if (/^(II\*\0|MM\0\*)/.test(text)) return `${file.name} is TIFF, which browsers do not read: save it as JPEG or PNG.`;
  const picture = /^(\xff\xd8\xff|\x89PNG|GIF8|BM|RIFF....WEBP|....ftypavi[fs])/s.test(text);
  if (picture) return `${file.name} does not decode: the file is damaged or cut off, so choose another copy.`;
  return `${file.name} is no photograph: choose a JPEG, PNG or WebP file.`;
}

/** Decode a file, upright and without a change of its colours, as the training did. */
async function decode(file) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none", imageOrientation: "from-image" };
  try {
    return await createImageBitmap(file, options);
  } catch {
    throw new Error(await refusal(file));
  }
}

/** Read a picture in bands and make the view of it that the network takes: 3×H×W bytes. */
function makeView(picture, size) {
  const { width, height } = picture;
  const resizer = new Resizer([height, width], size, about.view === "low" ? 2 : 1);
  const rows = Math.min(height, Math.max(1, Math.floor(BAND / width)));
  const canvas = new OffscreenCanvas(width, rows);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.globalCompositeOperation = "copy";
  for (let row = 0; row < height; row += rows) {
    context.drawImage(picture, 0, -row);
    resizer.add(context.getImageData(0, 0, width, Math.min(rows, height - row)).data);
  }
  return { pixels: resizer.finish(), shape: resizer.newSize };
}

/** Bring boxes of the view to the pixels of the photograph, and leave out what has score 0 or no area. */
function readOutputs({ boxes, scores, labels }, size, { width, height }) {
  const shrink = about.view === "low" ? 2 : 1;
  const ratio = [(shrink * width) / size[1], (shrink * height) / size[0]];
  const found = [];
  for (let i = 0; i < scores.data.length && scores.data[i] > 0; i++) {
    const box = Array.from(boxes.data.subarray(4 * i, 4 * i + 4), (side, k) => side * ratio[k % 2]);
    const [x0, y0, x1, y1] = box.map((side, k) => Math.min(side, k % 2 ? height : width));
    if (x1 > x0 && y1 > y0) found.push({ box: [x0, y0, x1, y1], score: scores.data[i], label: Number(labels.data[i]) });
  }
  return found;
}

/** Detect in a file or a picture: its size, the detections (best first), and the milliseconds of each step. */
async function detect(source) {
  const started = performance.now();
  const picture = source instanceof Blob ? await decode(source) : source;
  try {
    const { width, height } = picture;
    const decoded = performance.now();
    const size = resizedSize(height, width, about.short_side, about.max_side);
    const { pixels, shape } = makeView(picture, size);
    const images = new Tensor("uint8", pixels, [1, 3, ...shape]);
    const resized = performance.now();
    const outputs = await session.run({ images });
    const ended = performance.now();
    const found = readOutputs(outputs, size, picture);
    const ms = { decode: decoded - started, resize: resized - decoded, network: ended - resized };
    return { width, height, found, ms };
  } finally {
    picture.close();
  }
}

self.onmessage = async ({ data: { id, source, files } }) => {
  try {
    self.postMessage({ id, answer: files ? await load(files) : await detect(source) });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};
