// Spectrograms on a musical scale, computed while samples arrive, for pictures of at most some hundred columns.

/** @typedef {{ width: number, height: number, decibels: Float32Array }} Picture columns one behind the other, low pitch
 *   first; dB of full scale */

const MOST_COLUMNS = 900;
const ROWS = 96;
const LOWEST_HZ = 50;
const FLOOR_DB = -120;

/** In-place FFT of a length that is a power of two. @param {Float64Array} re @param {Float64Array} im */
export function fft(re, im) {
  const n = re.length;
  for (let i = 1, j = 0; i < n; i += 1) {
    let bit = n >> 1;
    for (; j & bit; bit >>= 1) j ^= bit;
    j ^= bit;
    if (i < j) {
      [re[i], re[j]] = [re[j], re[i]];
      [im[i], im[j]] = [im[j], im[i]];
    }
  }
  for (let size = 2; size <= n; size *= 2) {
    for (let k = 0; k < size / 2; k += 1) {
      const angle = (-2 * Math.PI * k) / size;
      const [c, s] = [Math.cos(angle), Math.sin(angle)];
      for (let at = k; at < n; at += size) {
        const to = at + size / 2;
        const [x, y] = [re[to] * c - im[to] * s, re[to] * s + im[to] * c];
        [re[to], im[to]] = [re[at] - x, im[at] - y];
        re[at] += x;
        im[at] += y;
      }
    }
  }
}

export class Spectrogram {
  /** @param {number} total samples of the signal @param {number} rate in Hz */
  constructor(total, rate) {
    this.size = 2 ** Math.round(Math.log2(rate * 0.06)); // about 60 ms
    this.hop = Math.max(Math.floor(this.size / 4), Math.ceil(total / MOST_COLUMNS));
    this.width = Math.max(1, Math.ceil(total / this.hop));
    this.decibels = new Float32Array(this.width * ROWS).fill(FLOOR_DB);
    this.window = Float64Array.from({ length: this.size }, (_, k) => 0.5 - 0.5 * Math.cos((2 * Math.PI * k) / this.size));
    const octaves = Math.log2(rate / 2 / LOWEST_HZ);
    this.edges = Array.from({ length: ROWS + 1 }, (_, r) => ((LOWEST_HZ * 2 ** ((octaves * r) / ROWS)) / rate) * this.size);
    this.held = new Float32Array(0);
    this.begin = 0; // the sample at the front of `held`
    this.column = 0;
  }

  /** The next samples, of one channel. @param {Float32Array} samples */
  add(samples) {
    const joined = new Float32Array(this.held.length + samples.length);
    joined.set(this.held);
    joined.set(samples, this.held.length);
    this.held = joined;
    this.draw(false);
    const keep = Math.max(0, Math.min(this.column * this.hop - this.begin, this.held.length));
    this.held = this.held.slice(keep);
    this.begin += keep;
  }

  /** @param {boolean} last whether what is missing is silence */
  draw(last) {
    const end = this.begin + this.held.length;
    while (this.column < this.width && (last || this.column * this.hop + this.size <= end)) {
      const first = this.column * this.hop - this.begin;
      const re = this.window.map((w, k) => w * (this.held[first + k] ?? 0));
      const im = new Float64Array(this.size);
      fft(re, im);
      for (let row = 0; row < ROWS; row += 1) {
        const low = Math.floor(this.edges[row]);
        let power = 0;
        for (let bin = low; bin < Math.max(this.edges[row + 1], low + 1) && bin <= this.size / 2; bin += 1) {
          power = Math.max(power, re[bin] ** 2 + im[bin] ** 2);
        }
        const decibels = 10 * Math.log10(power * (4 / this.size) ** 2 + 1e-30);
        this.decibels[this.column * ROWS + row] = Math.max(FLOOR_DB, decibels);
      }
      this.column += 1;
    }
  }

  /** @returns {Picture} */
  picture() {
    this.draw(true);
    return { width: this.width, height: ROWS, decibels: this.decibels };
  }
}
