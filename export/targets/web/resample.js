// From one sample rate to another, block by block: a linear-phase low-pass (a sinc under a Kaiser window), with the band
// edges of soxr's high quality, which avsep resamples with: flat up to 91.36 % of the lower Nyquist frequency, 120 dB
// down from that frequency on.

const PASS = 0.9136;
const REJECTION_DB = 120;
const MOST_COEFFICIENTS = 1 << 22;

/** @param {number} a @param {number} b @returns {number} */
const divisor = (a, b) => (b ? divisor(b, a % b) : a);

/** The modified Bessel function of order 0. @param {number} x */
function bessel(x) {
  let sum = 1;
  let term = 1;
  for (let k = 1; term > 1e-16 * sum; k += 1) {
    term *= (x / (2 * k)) ** 2;
    sum += term;
  }
  return sum;
}

/** How many samples come of `samples`. @param {number} samples @param {number} from @param {number} to */
export function resampledLength(samples, from, to) {
  return from === to ? samples : Math.max(Math.round((samples * to) / from), 1);
}

/** Resamples one channel; `push` and `flush` together give `resampledLength` samples. */
export class Resampler {
  /** @param {number} from rate in Hz @param {number} to rate in Hz */
  constructor(from, to) {
    const shared = divisor(from, to);
    this.up = to / shared; // output sample m stands at input sample m * down / up
    this.down = from / shared;
    const lower = Math.min(1, to / from); // the lower Nyquist frequency, of the input's
    this.cutoff = ((1 + PASS) / 2) * lower;
    const beta = 0.1102 * (REJECTION_DB - 8.7);
    const width = (1 - PASS) * lower * Math.PI; // of the transition, in radians a sample
    this.half = Math.ceil((REJECTION_DB - 7.95) / (2.285 * width) / 2);
    this.window = (/** @type {number} */ x) =>
      Math.abs(x) >= this.half ? 0 : bessel(beta * Math.sqrt(1 - (x / this.half) ** 2)) / bessel(beta);
    /** @type {Map<number, Float64Array>} */
    this.phases = new Map();
    this.buffer = new Float32Array(0);
    this.begin = -this.half; // the input sample at the front of the buffer; zeros stand before the first one
    this.received = 0;
    this.given = 0;
    this.append(new Float32Array(this.half));
  }

  /** The filter's values around a moment that lies `phase / up` after an input sample. @param {number} phase */
  coefficients(phase) {
    let found = this.phases.get(phase);
    if (!found) {
      found = new Float64Array(2 * this.half);
      for (let k = 0; k < found.length; k += 1) {
        const x = k - this.half + 1 - phase / this.up; // of input sample k from the moment
        const sinc = x === 0 ? 1 : Math.sin(Math.PI * this.cutoff * x) / (Math.PI * this.cutoff * x);
        found[k] = this.cutoff * sinc * this.window(x);
      }
      if ((this.phases.size + 1) * found.length <= MOST_COEFFICIENTS) this.phases.set(phase, found);
    }
    return found;
  }

  /** @param {Float32Array} samples */
  append(samples) {
    const joined = new Float32Array(this.buffer.length + samples.length);
    joined.set(this.buffer);
    joined.set(samples, this.buffer.length);
    this.buffer = joined;
  }

  /** @param {number} most how many samples may have been given afterwards @returns {Float32Array} */
  ready(most) {
    const out = [];
    const end = this.begin + this.buffer.length;
    while (this.given < most) {
      const at = this.given * this.down;
      const middle = Math.floor(at / this.up);
      if (middle + this.half >= end) break;
      const filter = this.coefficients(at - middle * this.up);
      const first = middle - this.half + 1 - this.begin;
      let sum = 0;
      for (let k = 0; k < filter.length; k += 1) sum += filter[k] * this.buffer[first + k];
      out.push(sum);
      this.given += 1;
    }
    const next = Math.floor((this.given * this.down) / this.up) - this.half + 1;
    if (next > this.begin) {
      this.buffer = this.buffer.slice(Math.min(next - this.begin, this.buffer.length));
      this.begin = next;
    }
    return Float32Array.from(out);
  }

  /** @param {Float32Array} samples @returns {Float32Array} */
  push(samples) {
    this.received += samples.length;
    if (this.up === this.down) return samples;
    this.append(samples);
    return this.ready(Infinity);
  }

  /** @returns {Float32Array} */
  flush() {
    if (this.up === this.down) return new Float32Array(0);
    this.append(new Float32Array(2 * this.half + this.down));
    return this.ready(resampledLength(this.received, this.down, this.up));
  }
}
