// A bundle: its manifest, the hashes of its files, and its golden inputs and outputs.

import { readNpz } from "./npz.js";

/** @typedef {import("./chunking.js").Chunking} Chunking */
/** @typedef {{ name: string, dtype: string, shape: (number | string)[] }} Tensor */
/** @typedef {{ file: string, kind: string, precision: string, inputs: Tensor[], outputs: Tensor[],
 *   profiles: Record<string, { min: number[], opt: number[], max: number[] }>[], golden: string, tolerance: number,
 *   stream?: { frames: number, states: { name: string, input: string, output: string }[] } }} Graph */
/** @typedef {{ role: "object" | "motion", kind: string, name: string, dim: number, frames: number,
 *   rate_hz?: number | null, graph: string | null }} VisualSource */
/** @typedef {{ format: string, version: number, name: string, made_from: string, licence: string,
 *   weights_licence: string, classes: string[], independent_sources?: boolean, sample_rate_hz: number,
 *   channels?: number, presence_threshold?: number | null, chunking: Chunking, visual: VisualSource[],
 *   plan?: { by_name?: boolean }, transform?: { n_fft: number, hop: number, frames: number },
 *   separator: { num_classes: number, front_end: { limit_mask_sum?: boolean } }, graphs: Graph[], files: Record<string, string>,
 *   manifest_sha256?: string }} Manifest */

export const VERSIONS = [2, 3, 4];
export const PRESENCE = "presence";

/** The SHA-256 of bytes in hexadecimal digits. @param {Uint8Array} bytes */
export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", /** @type {BufferSource} */ (bytes)));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** JSON as Python writes it in ASCII with sorted keys and no spaces, its numbers as they stand in `text`, without the
 * key `left` of the outermost object. @param {string} text @param {string} left */
export function canonical(text, left) {
  let place = 0;
  const space = () => {
    while (" \t\r\n".includes(text[place] ?? "x")) place += 1;
  };
  /** @returns {string} */
  const string = () => {
    const match = /"(?:[^"\\]|\\.)*"/y;
    match.lastIndex = place;
    const found = match.exec(text)?.[0];
    if (found === undefined) throw new Error("it is not valid JSON");
    place += found.length;
    return JSON.parse(found);
  };
  const ascii = (/** @type {string} */ value) =>
    JSON.stringify(value).replace(/[\u007f-\uffff]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`);
  /** @param {number} depth @returns {string} */
  const value = (depth) => {
    space();
    const first = text[place];
    if (first === '"') return ascii(string());
    if (first === "{" || first === "[") {
      const last = first === "{" ? "}" : "]";
      /** @type {[string, string][]} */
      const items = [];
      place += 1;
      for (space(); text[place] !== last; space()) {
        if (place >= text.length) throw new Error("it is not valid JSON");
        if (text[place] === ",") place += 1;
        space();
        const key = first === "{" ? string() : "";
        space();
        if (first === "{") place += 1; // the colon
        items.push([key, value(depth + 1)]);
      }
      place += 1;
      if (first === "[") return `[${items.map(([, item]) => item).join(",")}]`;
      const kept = items.filter(([key]) => depth > 0 || key !== left).sort(([a], [b]) => (a < b ? -1 : 1));
      return `{${kept.map(([key, item]) => `${ascii(key)}:${item}`).join(",")}}`;
    }
    const match = /-?[0-9][0-9.eE+-]*|true|false|null/y;
    match.lastIndex = place;
    const found = match.exec(text)?.[0];
    if (found === undefined) throw new Error("it is not valid JSON");
    place += found.length;
    return found;
  };
  return value(0);
}

/** A manifest from its file's bytes. Throws an Error with a line for people.
 * @param {Uint8Array} bytes @returns {Promise<Manifest>} */
export async function readManifest(bytes) {
  const text = new TextDecoder().decode(bytes);
  /** @type {Manifest} */
  const manifest = JSON.parse(text);
  const seal = manifest.manifest_sha256;
  if (seal && (await sha256(new TextEncoder().encode(canonical(text, "manifest_sha256")))) !== seal) {
    throw new Error("manifest.json is damaged: it is not what was exported (its manifest_sha256 differs)");
  }
  if (manifest.format !== "avsep-bundle") throw new Error("manifest.json is not of an avsep bundle");
  if (!VERSIONS.includes(manifest.version)) {
    throw new Error(`the bundle is of version ${manifest.version}, and this page reads ${VERSIONS.join(", ")}`);
  }
  return manifest;
}

/** Files of a bundle, read from beside the page and held against the manifest's hashes. */
export class Files {
  /** @param {URL} base @param {Manifest} manifest */
  constructor(base, manifest) {
    this.base = base;
    this.manifest = manifest;
  }

  /** @param {URL} base */
  static async open(base) {
    return new Files(base, await readManifest(await download(new URL("manifest.json", base))));
  }

  /** @param {string} name @returns {Promise<Uint8Array>} */
  async read(name) {
    const stated = this.manifest.files[name];
    if (!stated) throw new Error(`the bundle lacks the file ${name}`);
    const bytes = await download(new URL(name, this.base));
    if ((await sha256(bytes)) !== stated) {
      throw new Error(`${name} is not the file that was exported (its SHA-256 differs): copy the site again`);
    }
    return bytes;
  }

  /** The golden arrays of a graph, inputs and outputs by name. @param {Graph} graph */
  async golden(graph) {
    const arrays = await readNpz(await this.read(graph.golden));
    for (const tensor of [...graph.inputs, ...graph.outputs]) {
      if (!(tensor.name in arrays)) throw new Error(`${graph.golden} has no array '${tensor.name}'`);
    }
    return arrays;
  }
}

/** @param {URL} url @returns {Promise<Uint8Array>} */
export async function download(url) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url.pathname.split("/").pop()} cannot be loaded (${answer.status}): copy the site again`);
  return new Uint8Array(await answer.arrayBuffer());
}

/** The largest absolute difference of two arrays; NaN and infinite values throw. @param {ArrayLike<number>} found
 * @param {ArrayLike<number>} expected */
export function largestDifference(found, expected) {
  if (found.length !== expected.length) throw new Error(`it gives ${found.length} values instead of ${expected.length}`);
  let worst = 0;
  for (let k = 0; k < found.length; k += 1) {
    if (!Number.isFinite(found[k])) throw new Error("it gives NaN or infinite samples");
    worst = Math.max(worst, Math.abs(found[k] - expected[k]));
  }
  return worst;
}
