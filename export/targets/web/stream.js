// A graph that goes frame by frame, as a stream: samples of any number in, samples of each source out. The rules of
// avsep_runtime/streaming.py.

import { PRESENCE } from "./bundle.js";

/** @typedef {import("./bundle.js").Manifest} Manifest */
/** @typedef {import("./bundle.js").Graph} Graph */
/** @typedef {import("./npz.js").Values} Values */
/** @typedef {Record<string, { data: Values, shape: number[] }>} Inputs */
/** @typedef {(inputs: Inputs) => Promise<Record<string, Float32Array>>} Run */
/** @typedef {{ hop: number, nFft: number, frames: number, clipFrames: number, channels: number, sources: number | null,
 *   states: { name: string, dtype: string, shape: (number | string)[] }[] }} Layout what a call takes and gives; `sources`
 *   is null where their number is open */

const COUNTED = "counted"; // of a graph of several frames a call: 0 of those beyond the end of the stream, else 1
const SEQUENCES = ["mixture", "sources", PRESENCE]; // whose golden arrays hold a sequence of calls
const LEAST_ENVELOPE = Math.fround(1e-11);

/** @param {Manifest} manifest @param {Graph} graph of kind `stream` @returns {Layout} */
export function layoutOf({ transform, channels = 1 }, { inputs, stream }) {
  if (!transform || !stream) throw new Error("manifest.json says nothing of the stream's states: export the bundle again");
  const sources = inputs.find((tensor) => tensor.name === "class_ids")?.shape[1];
  const states = stream.states.map(({ name, input }) => {
    const tensor = inputs.find((one) => one.name === input);
    if (!tensor) throw new Error(`the graph has no input ${input} for its state ${name}: export the bundle again`);
    return { name, dtype: tensor.dtype, shape: tensor.shape };
  });
  const { n_fft: nFft, hop, frames: clipFrames } = transform;
  return { hop, nFft, frames: stream.frames, clipFrames, channels, sources: typeof sources === "number" ? sources : null, states };
}

/** The most samples between a sample's arrival and its coming out, without the computing. @param {Layout} layout */
export const latencyOf = ({ nFft, frames, hop }) => nFft + (frames - 1) * hop;

/** Zeros as ONNX Runtime holds them. @param {string} dtype @param {number} size @returns {Values} */
function zeros(dtype, size) {
  if (dtype === "int64") return new BigInt64Array(size);
  return dtype === "bool" || dtype === "uint8" ? new Uint8Array(size) : new Float32Array(size);
}

/** Run a graph on its golden sequence, each call with the states of the one before; `check` takes what comes out, and what
 * that should be. (States have no full scale; where one is wrong, so is what comes out of the next calls.) @param {Run} run @param {Graph} graph
 * @param {Record<string, import("./npz.js").NpyArray>} golden
 * @param {(found: Float32Array, expected: ArrayLike<number>) => void} check */
export async function runSequence(run, graph, golden, check) {
  const calls = golden.mixture.shape[0];
  const call = (/** @type {string} */ name, /** @type {number} */ k) => {
    const { data } = golden[name];
    return data.subarray((k * data.length) / calls, ((k + 1) * data.length) / calls);
  };
  /** @type {Inputs} */
  const inputs = {};
  for (const { name } of graph.inputs) inputs[name] = golden[name];
  for (let k = 0; k < calls; k += 1) {
    inputs.mixture = { data: call("mixture", k), shape: golden.mixture.shape.slice(1) };
    const outputs = await run(inputs);
    for (const { name } of graph.outputs) {
      const found = outputs[name];
      if (SEQUENCES.includes(name)) check(found, /** @type {any} */ (call(name, k)));
      const state = name.replace("next_", "state_");
      if (state !== name) inputs[state] = { data: found, shape: inputs[state].shape };
    }
  }
}

/** One stream through a graph. */
export class FrameStream {
  /** @param {Run} run outputs by name, which it hands over @param {Layout} layout
   * @param {number} count of sources; a graph of more is given the last one again
   * @param {(start: number, width: number) => Promise<Inputs>} look what is seen of `width` sources from a sample on, class
   * ids among it; called as each clip begins @param {number} channels of the blocks, one or the graph's */
  constructor(run, layout, count, look, channels) {
    this.run = run;
    this.layout = layout;
    this.count = count;
    this.look = look;
    this.channels = channels;
    this.width = layout.sources ?? count;
    /** @type {Inputs} */
    this.states = {};
    for (const { name, dtype, shape } of layout.states) {
      const sizes = shape.map((size) => (typeof size === "number" ? size : this.width));
      this.states[name] = { data: zeros(dtype, sizes.reduce((a, b) => a * b, 1)), shape: sizes };
    }
    /** @type {Inputs} */
    this.seen = {};
    // The first frame ends half a window after the stream's first sample, and reads zeros before it. What of it the
    // graph does not take as a block lies in its state.
    this.first = layout.nFft / 2 - layout.hop;
    /** @type {Float32Array[]} */
    this.held = Array.from({ length: channels }, () => new Float32Array(0));
    this.begun = false;
    this.done = 0; // frames
    this.received = 0;
    this.emitted = 0;
    this.clips = 0;
    /** @type {number[] | null} */
    this.told = null; // of the clip that is going on
    /** @type {number[][]} */
    this.clipsTold = [];
  }

  /** The presence of each source in each clip so far. */
  get presence() {
    return this.told ? [...this.clipsTold, this.told] : this.clipsTold;
  }

  /** The next samples, a row a channel -> what is ready of each source, a row a channel.
   * @param {Float32Array[]} block @returns {Promise<Float32Array[][]>} */
  async push(block) {
    this.received += block[0].length;
    return this.advance(block, Infinity);
  }

  /** The sound has ended: the rest. Nothing can be pushed afterwards. @returns {Promise<Float32Array[][]>} */
  async flush() {
    const { hop, nFft, frames, channels } = this.layout;
    if (!this.received) return this.joined([]);
    const last = Math.floor(this.received / hop); // of the frames that the whole has
    const calls = Math.ceil((last + 1 - this.done) / frames);
    const missing = Math.max(0, (this.begun ? 0 : this.first) + calls * frames * hop - this.held[0].length);
    const parts = [await this.advance(this.held.map(() => new Float32Array(missing)), last)];
    const begin = Math.max(0, this.emitted - (this.done * hop - nFft / 2)); // before lies nothing of the stream
    const [overlap, envelope] = [this.states.overlap.data, this.states.envelope.data].map((data) => /** @type {Float32Array} */ (data));
    const length = nFft - hop;
    const end = Math.min(length, begin + this.received - this.emitted);
    parts.push(
      this.rows((n, c) => {
        const out = new Float32Array(Math.max(0, end - begin));
        for (let k = begin; k < end; k += 1) {
          const value = overlap[(n * channels + c) * length + k] / Math.max(envelope[k], LEAST_ENVELOPE);
          out[k - begin] = Math.max(-1, Math.min(1, value));
        }
        return out;
      }),
    );
    this.emitted = this.received;
    return this.joined(parts);
  }

  /** @param {(source: number, channel: number) => Float32Array} make */
  rows(make) {
    return Array.from({ length: this.count }, (_, n) => Array.from({ length: this.channels }, (_, c) => make(n, c)));
  }

  /** @param {Float32Array[][][]} parts */
  joined(parts) {
    return this.rows((n, c) => concatenated(parts.map((part) => part[n][c])));
  }

  /** Give the graph all whole blocks that there are; `last` is the last frame that counts.
   * @param {Float32Array[]} samples @param {number} last */
  async advance(samples, last) {
    const { hop, nFft, frames, channels } = this.layout;
    this.held = this.held.map((row, c) => concatenated([row, samples[c]]));
    if (!this.begun) {
      if (this.held[0].length < this.first) return this.joined([]);
      const into = /** @type {Float32Array} */ (this.states.samples.data);
      for (let c = 0; c < channels; c += 1) {
        into.set(this.row(c).subarray(0, this.first), (c + 1) * (nFft - hop) - this.first);
      }
      this.held = this.held.map((row) => row.subarray(this.first));
      this.begun = true;
    }
    const length = frames * hop;
    const parts = [];
    while (this.held[0].length >= length) {
      const from = Math.max(0, nFft / 2 - this.done * hop); // before lies nothing of the stream
      const sources = await this.call(length, last);
      this.held = this.held.map((row) => row.subarray(length));
      const to = Math.min(length, from + this.received - this.emitted);
      if (from >= to) continue;
      parts.push(this.rows((n, c) => sources.subarray((n * channels + c) * length + from, (n * channels + c) * length + to)));
      this.emitted += to - from;
    }
    return this.joined(parts);
  }

  /** What a channel of the graph is given: one sound goes into all. @param {number} channel */
  row(channel) {
    return this.held[Math.min(channel, this.channels - 1)];
  }

  /** One call of the graph, on the first `length` samples that are held. @param {number} length @param {number} last */
  async call(length, last) {
    const { frames, clipFrames, channels, states } = this.layout;
    if (this.done >= this.clips * clipFrames) await this.beginClip();
    const mixture = new Float32Array(channels * length);
    for (let c = 0; c < channels; c += 1) mixture.set(this.row(c).subarray(0, length), c * length);
    const counted = Float32Array.from({ length: frames }, (_, k) => (this.done + k <= last ? 1 : 0));
    /** @type {Inputs} */
    const inputs = { mixture: { data: mixture, shape: channels > 1 ? [1, channels, length] : [1, length] }, ...this.seen };
    if (frames > 1) inputs[COUNTED] = { data: counted, shape: [1, frames] };
    for (const [name, state] of Object.entries(this.states)) inputs[`state_${name}`] = state;
    const outputs = await this.run(inputs);
    for (const { name } of states) this.states[name] = { ...this.states[name], data: outputs[`next_${name}`] };
    if (PRESENCE in outputs && (this.told === null || this.done + frames - 1 <= last)) {
      this.told = [...outputs[PRESENCE].subarray(0, this.count)];
    }
    this.done += frames;
    if (!outputs.sources.every(Number.isFinite)) throw new Error("the graph answers NaN or infinite samples");
    return outputs.sources;
  }

  /** Look at what is seen from here on, and tell presence anew. */
  async beginClip() {
    if (this.told) this.clipsTold.push(this.told);
    this.told = null;
    for (const [name, { data, shape }] of Object.entries(this.states)) {
      if (name.startsWith(PRESENCE)) this.states[name] = { data: /** @type {any} */ (data).slice().fill(0), shape };
    }
    this.seen = await this.look(this.done * this.layout.hop, this.width);
    this.clips = Math.floor(this.done / this.layout.clipFrames) + 1;
  }
}

/** @param {Float32Array[]} parts */
export function concatenated(parts) {
  if (parts.length === 1) return parts[0];
  const out = new Float32Array(parts.reduce((sum, part) => sum + part.length, 0));
  let place = 0;
  for (const part of parts) {
    out.set(part, place);
    place += part.length;
  }
  return out;
}
