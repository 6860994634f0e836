// Separating with a bundle's graphs, chunk by chunk or as a stream: what avsep_runtime/separator.py and calls.py do.

import { PRESENCE } from "./bundle.js";
import { Joiner, planChunks } from "./chunking.js";
import { FrameStream, layoutOf } from "./stream.js";
import { objectFrames, middleOf, motionFrames } from "./timeline.js";

/** @typedef {import("./bundle.js").Manifest} Manifest */
/** @typedef {import("./bundle.js").VisualSource} VisualSource */
/** @typedef {import("./engine.js").Engine} Engine */
/** @typedef {import("./timeline.js").Timeline} Timeline */
/** @typedef {{ classId: number, timeline: Timeline | null }} Source */

const MOST_ENCODED = 256; // results of visual encoders that are remembered

/** A graph of the manifest that this page can run: fp32 where it is there. Throws where there is none.
 * @param {Manifest} manifest */
export function graphOf(manifest) {
  const graphs = manifest.graphs.filter((graph) => graph.kind === "separator" || graph.kind === "stream");
  const found = graphs.find((graph) => graph.precision === "fp32") ?? graphs[0];
  if (!found) throw new Error("the bundle was exported with --spectral, which no browser runs: export it without");
  return found;
}

/** @param {number | string} size @param {number} otherwise */
const fixed = (size, otherwise) => (typeof size === "number" ? size : otherwise);

export class Separator {
  /** @param {Manifest} manifest @param {Engine} engine @param {Map<string, Engine>} encoders by role */
  constructor(manifest, engine, encoders) {
    this.manifest = manifest;
    this.engine = engine;
    this.encoders = encoders;
    this.channels = manifest.channels ?? 1;
    this.shapes = Object.fromEntries(engine.graph.inputs.map((tensor) => [tensor.name, tensor.shape]));
    /** What a causal separator takes in a call; null of one that takes chunks. */
    this.layout = engine.graph.kind === "stream" ? layoutOf(manifest, engine.graph) : null;
    /** @type {Map<string, Float32Array>} */
    this.encoded = new Map();
  }

  /** Separate `total` samples of `channels` channels (one, or the bundle's).
   *
   * `read` gives samples from a start on, a row a channel; `write` takes what is done of each source, in order, a row a
   * channel. Gives of each source the presence that one chunk in twenty reaches (the largest of up to twenty), or null
   * where the bundle does not tell.
   * @param {number} total @param {number} channels @param {Source[]} sources
   * @param {(start: number, count: number) => Promise<Float32Array[]>} read
   * @param {(start: number, done: Float32Array[][]) => Promise<void>} write
   * @param {(done: number, total: number) => void} progress @returns {Promise<Float32Array | null>} */
  async separate(total, channels, sources, read, write, progress) {
    const { clip_samples: clip, crossfade_samples: crossfade } = this.manifest.chunking;
    if (this.layout) {
      const stream = this.stream(sources, channels);
      let place = 0;
      for (let start = 0; start < total; start += clip) {
        const ready = await stream.push(await read(start, Math.min(clip, total - start)));
        if (ready[0][0].length) await write(place, ready);
        place += ready[0][0].length;
        progress(Math.min(start + clip, total), total);
      }
      const rest = await stream.flush();
      if (rest[0][0].length) await write(place, rest);
      return stream.presence;
    }
    const chunks = planChunks(total, this.manifest.chunking);
    const joiner = new Joiner(total, sources.length * channels, crossfade);
    const rows = fixed(this.shapes.class_ids[0], 1); // chunks in one call
    /** @type {number[][]} */
    const told = []; // a row a chunk
    let place = 0;
    for (let first = 0; first < chunks.length; first += rows) {
      const group = chunks.slice(first, first + rows);
      const mixtures = [];
      for (const { start } of group) {
        const samples = await read(start, Math.min(clip, total - start));
        mixtures.push(samples.map((part) => padded(part, clip)));
      }
      const { estimates, presence } = await this.call(group.map((c) => c.start), mixtures, sources, total);
      if (presence) told.push(...presence.slice(0, group.length));
      for (let row = 0; row < group.length; row += 1) {
        const done = joiner.add(group[row], estimates[row]);
        await write(place, sources.map((_, n) => done.slice(n * channels, (n + 1) * channels)));
        place += done[0].length;
      }
      progress(first + group.length, chunks.length);
    }
    return presenceOf(told);
  }

  /** One stream of a causal separator. @param {Source[]} sources @param {number} channels one, or the bundle's
   * @param {number} [offset] of its first sample from the beginning of what is seen */
  stream(sources, channels, offset = 0) {
    return new SourceStream(this, sources, channels, offset);
  }

  /** Encode what a stream of `total` samples will see, so that no block waits for it. @param {Source[]} sources
   * @param {number} total */
  async lookAhead(sources, total) {
    if (!this.layout || !sources.some(({ timeline }) => timeline)) return;
    const clip = this.layout.clipFrames * this.layout.hop;
    const most = MOST_ENCODED / (sources.length * this.manifest.visual.length);
    for (let k = 0; k * clip < total && k < most; k += 1) await this.inputsOfAll(sources, k * clip, k * clip);
  }

  /** The graph's inputs of sources in one chunk or clip. @param {Source[]} sources @param {number} start
   * @param {number} total @returns {Promise<import("./stream.js").Inputs>} */
  async inputsOfAll(sources, start, total) {
    const cells = [];
    for (const source of sources) cells.push(await this.inputsOf(source, start, total));
    /** @type {import("./stream.js").Inputs} */
    const inputs = {};
    for (const { name, dtype, shape } of this.engine.graph.inputs) {
      if (!(name in cells[0])) continue;
      const inner = shape.slice(2).map((size) => fixed(size, 1));
      inputs[name] = { data: joined(dtype, cells.map((cell) => cell[name])), shape: [1, cells.length, ...inner] };
    }
    return inputs;
  }

  /** Of each chunk the estimates, a row for each channel of each source, and the presence of each source.
   * @param {number[]} starts @param {Float32Array[][]} mixtures @param {Source[]} sources @param {number} total
   * @returns {Promise<{ estimates: Float32Array[][], presence: number[][] | null }>} */
  async call(starts, mixtures, sources, total) {
    const clip = this.manifest.chunking.clip_samples;
    const given = mixtures[0].length;
    const rows = fixed(this.shapes.class_ids[0], 1);
    const profile = this.engine.graph.profiles.find((p) => "class_ids" in p)?.class_ids;
    const width = fixed(this.shapes.class_ids[1], Math.min(sources.length, profile?.max[1] ?? sources.length));
    const mixture = new Float32Array(rows * this.channels * clip);
    const chunkOf = (/** @type {number} */ row) => Math.min(row, starts.length - 1); // missing ones repeat the last
    for (let row = 0; row < rows; row += 1) {
      for (let c = 0; c < this.channels; c += 1) {
        mixture.set(mixtures[chunkOf(row)][given === 1 ? 0 : c], (row * this.channels + c) * clip);
      }
    }
    const shape = this.channels > 1 ? [rows, this.channels, clip] : [rows, clip];
    /** @type {Float32Array[][]} */
    const estimates = starts.map(() => []);
    /** @type {number[][] | null} */
    let presence = null;
    for (let column = 0; column < sources.length; column += width) {
      const count = typeof this.shapes.class_ids[1] === "number" ? width : Math.min(width, sources.length - column);
      /** @type {Record<string, { data: import("./npz.js").Values, shape: number[] }>} */
      const inputs = { mixture: { data: mixture, shape } };
      const cells = [];
      for (let row = 0; row < rows; row += 1) {
        for (let n = 0; n < count; n += 1) {
          cells.push(await this.inputsOf(sources[Math.min(column + n, sources.length - 1)], starts[chunkOf(row)], total));
        }
      }
      for (const tensor of this.engine.graph.inputs) {
        if (tensor.name === "mixture") continue;
        const inner = tensor.shape.slice(2).map((size) => fixed(size, 1));
        const data = joined(tensor.dtype, cells.map((cell) => cell[tensor.name]));
        inputs[tensor.name] = { data, shape: [rows, count, ...inner] };
      }
      const outputs = await this.engine.run(inputs);
      const [estimate] = Object.keys(outputs).filter((name) => name !== PRESENCE);
      for (let row = 0; row < starts.length; row += 1) {
        for (let n = 0; n < Math.min(count, sources.length - column); n += 1) {
          for (let c = 0; c < given; c += 1) {
            const at = ((row * count + n) * this.channels + c) * clip;
            const part = outputs[estimate].slice(at, at + clip);
            if (!part.every(Number.isFinite)) throw new Error("the graph answers NaN or infinite samples");
            estimates[row].push(part);
          }
        }
      }
      if (PRESENCE in outputs) {
        presence ??= starts.map(() => []);
        for (let row = 0; row < starts.length; row += 1) {
          const told = outputs[PRESENCE].subarray(row * count, row * count + Math.min(count, sources.length - column));
          presence[row].push(...told);
        }
      }
    }
    return { estimates, presence };
  }

  /** The graph's inputs of one source in one chunk, by name, without the axes of chunks and sources.
   * @param {Source} source @param {number} start @param {number} total @returns {Promise<Record<string, ArrayLike<number>>>} */
  async inputsOf({ classId, timeline }, start, total) {
    /** @type {Record<string, ArrayLike<number>>} */
    const found = { class_ids: [classId], seen: [timeline ? 1 : 0], motion_seen: [timeline?.moves ? 1 : 0] };
    for (const [name, shape] of Object.entries(this.shapes)) {
      const size = shape.slice(2).reduce((/** @type {number} */ a, b) => a * fixed(b, 1), 1);
      if (name.endsWith("_features")) found[name] = new Float32Array(size);
      if (name === "motion_mask") found[name] = new Uint8Array(size).fill(1);
    }
    if (!timeline) return found;
    for (const visual of this.manifest.visual) {
      const encoded = await this.encode(visual, timeline, start, total);
      const into = /** @type {Float32Array} */ (found[`${visual.role}_features`]);
      if (visual.role === "object") {
        into.set(encoded);
        continue;
      }
      const width = fixed(this.shapes.motion_features[2], 1);
      const [steps, has] = [into.length / width, encoded.length / width];
      for (let d = 0; d < width; d += 1) into.set(encoded.subarray(d * has, (d + 1) * has), d * steps);
      if ("motion_mask" in found) /** @type {Uint8Array} */ (found.motion_mask).fill(0, has);
    }
    return found;
  }

  /** What a chunk sees of a source, as the encoder's graph gives it; computed once for the same frames.
   * @param {VisualSource} visual @param {Timeline} timeline @param {number} start @param {number} total */
  async encode(visual, timeline, start, total) {
    const engine = this.encoders.get(visual.role);
    if (!engine) throw new Error(`this bundle has no graph of a ${visual.role} encoder`);
    const { clip_samples: clip } = this.manifest.chunking;
    const rate = this.manifest.sample_rate_hz;
    const middle = middleOf(visual.role, start, clip, total, rate);
    const pick = visual.role === "object" ? objectFrames : motionFrames;
    const frames = pick(timeline, visual, middle, clip / rate);
    const key = `${visual.role} ${timeline.name} ${frames.indices.join()}`;
    let found = this.encoded.get(key);
    if (!found) {
      const [tensor] = engine.graph.inputs;
      const shape = tensor.shape.map((size) => fixed(size, 1));
      const one = shape.slice(1).reduce((a, b) => a * b, 1);
      if (one !== frames.data.length) {
        throw new Error(`${engine.graph.file} takes frames [${shape.slice(1).join(", ")}], and was given others`);
      }
      const data = new Uint8Array(one * shape[0]);
      for (let row = 0; row < shape[0]; row += 1) data.set(frames.data, row * one);
      const [output] = Object.values(await engine.run({ [tensor.name]: { data, shape } }));
      found = Float32Array.from(output.subarray(0, output.length / shape[0]));
      if (!found.every(Number.isFinite)) throw new Error(`${engine.graph.file} answers NaN or infinite features`);
    }
    this.encoded.delete(key); // the last one used stands last
    this.encoded.set(key, found);
    if (this.encoded.size > MOST_ENCODED) this.encoded.delete(/** @type {string} */ (this.encoded.keys().next().value));
    return found;
  }
}

/** Sound in, separated sound out, block by block, of any number of sources. Made by `Separator.stream`. */
class SourceStream {
  /** @param {Separator} separator @param {Source[]} sources @param {number} channels @param {number} offset */
  constructor(separator, sources, channels, offset) {
    const layout = separator.layout;
    if (!layout) throw new Error("this separator takes chunks, and is none of streams");
    const width = layout.sources ?? sources.length;
    /** @type {FrameStream[]} */
    this.parts = [];
    for (let first = 0; first < sources.length; first += width) {
      const own = sources.slice(first, first + width);
      const look = (/** @type {number} */ start, /** @type {number} */ count) => {
        const all = Array.from({ length: count }, (_, n) => own[Math.min(n, own.length - 1)]);
        return separator.inputsOfAll(all, offset + start, offset + start); // nothing later is there
      };
      const run = (/** @type {import("./stream.js").Inputs} */ inputs) => separator.engine.run(inputs);
      this.parts.push(new FrameStream(run, layout, own.length, look, channels));
    }
  }

  /** As `FrameStream.push`, of all sources. @param {Float32Array[]} block @returns {Promise<Float32Array[][]>} */
  async push(block) {
    const ready = [];
    for (const part of this.parts) ready.push(...(await part.push(block)));
    return ready;
  }

  /** @returns {Promise<Float32Array[][]>} */
  async flush() {
    const ready = [];
    for (const part of this.parts) ready.push(...(await part.flush()));
    return ready;
  }

  /** Of each source what one clip in twenty reaches; null where the bundle does not tell. */
  get presence() {
    const told = this.parts.map((part) => presenceOf(part.presence));
    return told.some((one) => one === null) ? null : Float32Array.from(told.flatMap((one) => [.../** @type {Float32Array} */ (one)]));
  }
}

/** Take what is done of each source away from the sound itself, in place: a row a channel.
 * @param {Float32Array[]} left @param {Float32Array[][]} done */
export function residual(left, done) {
  left.forEach((row, c) => {
    for (let k = 0; k < row.length; k += 1) {
      // in single precision, in this order: as NumPy adds sources up and takes them away
      let sum = 0;
      for (const source of done) sum = Math.fround(sum + source[c][k]);
      row[k] -= sum;
    }
  });
}

/** Of each source what one chunk in twenty reaches, the largest of up to twenty; null where nothing is told.
 * @param {number[][]} told a row a chunk */
function presenceOf(told) {
  if (told.length === 0) return null;
  const rank = Math.floor((told.length - 1) / 20);
  return Float32Array.from(told[0], (_, n) => told.map((row) => row[n]).sort((a, b) => b - a)[rank]);
}

/** @param {Float32Array} samples @param {number} length */
function padded(samples, length) {
  const out = new Float32Array(length);
  out.set(samples);
  return out;
}

/** Parts one behind the other, in the type that ONNX Runtime holds a tensor's values in.
 * @param {string} dtype @param {ArrayLike<number>[]} parts @returns {import("./npz.js").Values} */
function joined(dtype, parts) {
  const size = parts.reduce((sum, part) => sum + part.length, 0);
  if (dtype === "int64") return BigInt64Array.from(parts.flatMap((part) => [...Array.from(part)].map(BigInt)));
  const out = dtype === "bool" || dtype === "uint8" ? new Uint8Array(size) : new Float32Array(size);
  let place = 0;
  for (const part of parts) {
    out.set(part, place);
    place += part.length;
  }
  return out;
}
