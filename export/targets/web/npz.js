// NumPy's files: the arrays of a .npz, as the golden inputs and outputs of a bundle are kept.

import { inflate } from "./zip.js";

/** @typedef {Float32Array | Float64Array | BigInt64Array | Int32Array | Uint8Array | Uint16Array} Values */
/** @typedef {{ dtype: string, shape: number[], data: Values }} NpyArray */

/** What NumPy calls a type -> our name of it and how its values are held; booleans are bytes.
 * @type {Record<string, [string, (buffer: ArrayBuffer) => Values]>} */
const TYPES = {
  "<f4": ["float32", (b) => new Float32Array(b)],
  "<f8": ["float64", (b) => new Float64Array(b)],
  "<f2": ["float16", (b) => new Uint16Array(b)],
  "<i8": ["int64", (b) => new BigInt64Array(b)],
  "<i4": ["int32", (b) => new Int32Array(b)],
  "|u1": ["uint8", (b) => new Uint8Array(b)],
  "|b1": ["bool", (b) => new Uint8Array(b)],
};

/** The array of one .npy file. Throws an Error where it is damaged or not of numbers.
 * @param {Uint8Array} bytes @returns {NpyArray} */
export function readNpy(bytes) {
  const magic = String.fromCharCode(...bytes.subarray(0, 6));
  if (magic !== "\x93NUMPY") throw new Error("it is no .npy file");
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const begin = bytes[6] === 1 ? 10 : 12;
  const length = bytes[6] === 1 ? view.getUint16(8, true) : view.getUint32(8, true);
  const header = new TextDecoder("latin1").decode(bytes.subarray(begin, begin + length));
  const kind = /'descr'\s*:\s*'([^']*)'/.exec(header)?.[1] ?? "";
  const sizes = /'shape'\s*:\s*\(([\d\s,]*)\)/.exec(header)?.[1];
  if (!(kind in TYPES) || sizes === undefined || !/'fortran_order'\s*:\s*False/.test(header)) {
    throw new Error(`its header is not read here: ${header.trim().slice(0, 80)}`);
  }
  const shape = sizes.split(",").map((s) => s.trim()).filter(Boolean).map(Number);
  const [dtype, make] = TYPES[kind];
  const body = bytes.slice(begin + length); // aligned anew
  const data = make(body.buffer);
  if (data.length !== shape.reduce((a, b) => a * b, 1)) throw new Error("it was cut short");
  return { dtype, shape, data };
}

/** All arrays of a .npz by name. Throws an Error where it is damaged.
 * @param {Uint8Array} bytes @returns {Promise<Record<string, NpyArray>>} */
export async function readNpz(bytes) {
  /** @type {Record<string, NpyArray>} */
  const found = {};
  for (const [name, content] of await inflate(bytes)) {
    if (!name.endsWith(".npy")) throw new Error(`its member ${name} is no array`);
    found[name.slice(0, -4)] = readNpy(content);
  }
  return found;
}
