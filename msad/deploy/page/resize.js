// Resizing as the detector learned it: an antialiased bilinear filter in whole numbers, the same to the last bit as
// PyTorch's for photographs of 8 bits. (A canvas, asked to draw smaller, leaves pixels out.)

/** Compute height and width after resizing: short side as asked unless the long one exceeds its limit. */
export function resizedSize(height, width, shortSide, maxSide) {
  const scale = shortSide / Math.min(height, width);
  let [newHeight, newWidth] = height < width ? [shortSide, scale * width] : [scale * height, shortSide];
  const longest = Math.max(newHeight, newWidth);
  if (longest > maxSide) [newHeight, newWidth] = [newHeight * (maxSide / longest), newWidth * (maxSide / longest)];
  return [newHeight, newWidth].map((side) => Math.max(Math.floor(side + 0.5), 1));
}

/** Compute what every `step`-th output along one side reads: its first input, and the weights from there on. */
function makeFilter(before, after, step) {
  const scale = before / after;
  const support = Math.max(scale, 1);
  const starts = [];
  const shares = [];
  for (let i = 0; i < after; i += step) {
    const center = scale * (i + 0.5);
    const start = Math.max(Math.trunc(center - support + 0.5), 0);
    const end = Math.min(Math.trunc(center + support + 0.5), before);
    const weights = [];
    for (let j = start; j < end; j++) weights.push(Math.max(0, 1 - Math.abs((j - center + 0.5) * (1 / support))));
    const sum = weights.reduce((a, b) => a + b, 0);
    starts.push(start);
    shares.push(weights.map((weight) => weight / sum));
  }
  const most = shares.reduce((a, weights) => Math.max(a, ...weights), 0);
  let bits = 0; // as many as leave the largest weight within 16 bits
  while (bits < 22 && Math.trunc(0.5 + most * 2 ** (bits + 1)) < 2 ** 15) bits++;
  return { bits, starts, weights: shares.map((share) => Int32Array.from(share, (w) => Math.trunc(0.5 + w * 2 ** bits))) };
}

/**
 * Resize a photograph that comes in bands of rows, from top to bottom, and keep every `step`-th pixel of the result.
 * So a large photograph is never in memory as a whole.
 */
export class Resizer {
  constructor(size, newSize, step) {
    [this.height, this.width] = size;
    this.across = makeFilter(this.width, newSize[1], step);
    this.down = makeFilter(this.height, newSize[0], step);
    this.newSize = [this.down.starts.length, this.across.starts.length];
    this.narrow = new Uint8ClampedArray(3 * this.height * this.newSize[1]); // planes of R, G and B
    this.row = 0;
  }

  /** Take the next rows, as RGBA bytes. */
  add(rgba) {
    const { width, height, narrow, across: { bits, starts, weights } } = this;
    const columns = starts.length;
    const half = 1 << (bits - 1);
    for (let first = 0; first < rgba.length; first += 4 * width, this.row++) {
      for (let i = 0; i < columns; i++) {
        const share = weights[i];
        let [r, g, b] = [half, half, half];
        for (let j = 0, at = first + 4 * starts[i]; j < share.length; j++, at += 4) {
          r += share[j] * rgba[at];
          g += share[j] * rgba[at + 1];
          b += share[j] * rgba[at + 2];
        }
        const place = this.row * columns + i;
        narrow[place] = r >> bits;
        narrow[place + height * columns] = g >> bits;
        narrow[place + 2 * height * columns] = b >> bits;
      }
    }
  }

  /** Return the result: 3×H×W bytes. */
  finish() {
    const { height, narrow, newSize: [rows, columns], down: { bits, starts, weights } } = this;
    const result = new Uint8ClampedArray(3 * rows * columns);
    const sums = new Int32Array(columns);
    for (let plane = 0; plane < 3; plane++) {
      for (let i = 0; i < rows; i++) {
        sums.fill(1 << (bits - 1));
        weights[i].forEach((weight, j) => {
          const first = (plane * height + starts[i] + j) * columns;
          for (let column = 0; column < columns; column++) sums[column] += weight * narrow[first + column];
        });
        const place = (plane * rows + i) * columns;
        for (let column = 0; column < columns; column++) result[place + column] = sums[column] >> bits;
      }
    }
    return new Uint8Array(result.buffer);
  }
}
