// WAV files: read piece by piece, so that a long one never lies in memory as a whole, and written.

/** @typedef {{ kind: number, channels: number, rate: number, bits: number, start: number, size: number }} WavForm */

const PCM = 1;
const FLOAT = 3;
const EXTENSIBLE = 0xfffe;
export const RATES = [1000, 768_000];
const LARGEST_SAMPLE = 100; // beyond it are integers that somebody made floats of, or damage

/** @param {Blob} file @param {number} start @param {number} count */
async function viewOf(file, start, count) {
  return new DataView(await file.slice(start, start + count).arrayBuffer());
}

/** Four letters. @param {DataView} view @param {number} at */
const letters = (view, at) => String.fromCharCode(...[0, 1, 2, 3].map((k) => view.getUint8(at + k)));

/** Where a WAV or RF64 file has its samples; null of a file of another kind. Throws an Error with a line for people.
 * @param {Blob} file @param {string} name @returns {Promise<WavForm | null>} */
export async function findSamples(file, name) {
  const head = await viewOf(file, 0, 12);
  if (head.byteLength < 12 || !["RIFF", "RF64", "BW64"].includes(letters(head, 0)) || letters(head, 8) !== "WAVE") return null;
  /** @type {Omit<WavForm, "start" | "size"> | null} */
  let form = null;
  let wide = 0;
  let place = 12;
  while (place + 8 <= file.size) {
    const view = await viewOf(file, place, 8 + 40);
    const [chunk, size] = [letters(view, 0), view.getUint32(4, true)];
    if (chunk === "ds64" && view.byteLength >= 24) {
      wide = Number(view.getBigUint64(16, true));
    } else if (chunk === "fmt ") {
      if (size < 16 || view.byteLength < 24) throw new Error(`${name} is damaged: its format is cut short`);
      let kind = view.getUint16(8, true);
      if (kind === EXTENSIBLE && size >= 26) kind = view.getUint16(32, true);
      form = { kind, channels: view.getUint16(10, true), rate: view.getUint32(12, true), bits: view.getUint16(22, true) };
    } else if (chunk === "data") {
      if (!form) throw new Error(`${name} is damaged: its samples stand before their format`);
      const stated = size === 0xffffffff && wide ? wide : size;
      const there = file.size - place - 8;
      const unknown = (stated >= 0x7ffff000 && stated <= 0x80000000) || (stated >= 0xffffff00 && stated <= 0xffffffff);
      if (stated > there && !unknown) {
        throw new Error(`${name} is truncated: its header promises ${stated} bytes and ${there} are there; copy it again`);
      }
      return { ...form, start: place + 8, size: unknown ? there : stated };
    }
    place += 8 + size + (size % 2);
  }
  throw new Error(`${name} holds no samples: it is empty or truncated`);
}

/** Whether `readBlocks` reads them: integers of 8, 16, 24 or 32 bits, floats of 32 or 64. @param {WavForm} form */
export function isPlain({ kind, bits, channels }) {
  return channels > 0 && ((kind === PCM && [8, 16, 24, 32].includes(bits)) || (kind === FLOAT && [32, 64].includes(bits)));
}

/** One sample as a number in +-1. @param {WavForm} form @returns {(view: DataView, at: number) => number} */
function reader({ kind, bits }) {
  if (kind === FLOAT) return bits === 32 ? (v, at) => v.getFloat32(at, true) : (v, at) => v.getFloat64(at, true);
  if (bits === 8) return (v, at) => (v.getUint8(at) - 128) / 128;
  if (bits === 16) return (v, at) => v.getInt16(at, true) / 2 ** 15;
  if (bits === 24) return (v, at) => (v.getUint8(at) | (v.getUint8(at + 1) << 8) | (v.getInt8(at + 2) << 16)) / 2 ** 23;
  return (v, at) => v.getInt32(at, true) / 2 ** 31;
}

/** The samples, `most` of each channel at a time. @param {Blob} file @param {WavForm} form @param {number} most */
export async function* readBlocks(file, form, most) {
  const width = form.bits / 8;
  const frame = width * form.channels;
  const read = reader(form);
  const total = Math.floor(form.size / frame);
  for (let first = 0; first < total; first += most) {
    const count = Math.min(most, total - first);
    const view = await viewOf(file, form.start + first * frame, count * frame);
    const block = Array.from({ length: form.channels }, () => new Float32Array(count));
    for (let k = 0; k < count; k += 1) {
      for (let c = 0; c < form.channels; c += 1) block[c][k] = read(view, k * frame + c * width);
    }
    yield block;
  }
}

/** Throws an Error of samples that are NaN, infinite or far beyond full scale; gives their peak.
 * @param {string} name @param {Float32Array} samples */
export function checkSamples(name, samples) {
  let peak = 0;
  for (const value of samples) {
    if (!Number.isFinite(value)) throw new Error(`${name} has NaN or infinite samples: write it again without them`);
    peak = Math.max(peak, Math.abs(value));
  }
  if (peak > LARGEST_SAMPLE) {
    throw new Error(`${name} reaches ${peak.toPrecision(6)}, and full scale is 1: divide 16-bit samples by 32768`);
  }
  return peak;
}

/** A WAV file of samples that lie in a Blob as interleaved float32; PCM_16 clips what is beyond full scale.
 * @param {Blob} samples @param {number} channels @param {number} rate @param {"PCM_16" | "FLOAT"} format
 * @returns {Promise<Blob>} */
export async function wavFile(samples, channels, rate, format) {
  const width = format === "FLOAT" ? 4 : 2;
  const size = (samples.size / 4) * width;
  if (size > 0xffff0000) throw new Error("a WAV file of more than 4 GB is not written here: use avsep separate");
  const head = new DataView(new ArrayBuffer(44));
  const text = (/** @type {number} */ at, /** @type {string} */ word) => {
    for (let k = 0; k < word.length; k += 1) head.setUint8(at + k, word.charCodeAt(k));
  };
  text(0, "RIFF");
  head.setUint32(4, 36 + size, true);
  text(8, "WAVEfmt ");
  head.setUint32(16, 16, true);
  head.setUint16(20, format === "FLOAT" ? FLOAT : PCM, true);
  head.setUint16(22, channels, true);
  head.setUint32(24, rate, true);
  head.setUint32(28, rate * channels * width, true);
  head.setUint16(32, channels * width, true);
  head.setUint16(34, 8 * width, true);
  text(36, "data");
  head.setUint32(40, size, true);
  /** @type {BlobPart[]} */
  const parts = [head];
  if (format === "FLOAT") parts.push(samples);
  const block = 4 << 20;
  for (let at = 0; format !== "FLOAT" && at < samples.size; at += block) {
    const floats = new Float32Array(await samples.slice(at, at + block).arrayBuffer());
    const whole = new Int16Array(floats.length);
    for (let k = 0; k < floats.length; k += 1) {
      whole[k] = Math.max(-32768, Math.min(32767, evenRound(floats[k] * 32768)));
    }
    parts.push(new Blob([whole])); // a Blob each: the browser may keep it on disk
  }
  return new Blob(parts, { type: "audio/wav" });
}

/** To the nearest whole number, halves to the even one. @param {number} x */
function evenRound(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2 === 0 ? 0 : 1) : Math.round(x);
}
