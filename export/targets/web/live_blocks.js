// In the worker: the blocks of a live stream, from the audio thread through the graph and back.

import { Resampler } from "./resample.js";
import { residual } from "./separator.js";
import { concatenated, latencyOf } from "./stream.js";

/** @typedef {import("./separator.js").Separator} Separator */
/** @typedef {import("./separator.js").Source} Source */
/** @typedef {{ start: number, block: Float32Array }} Block of the stream from sample `start` on; a row behind the other */

const QUANTUM = 128; // samples that the audio thread works on at once

/** How many samples make a block, and how many lie between a sample's coming in and its coming out at least, where
 * computing takes less than `QUANTUM`; both at the context's rate. @param {import("./stream.js").Layout} layout
 * @param {number} own the separator's rate @param {number} rate the context's */
export function timing(layout, own, rate) {
  const call = layout.frames * layout.hop;
  const latency = latencyOf(layout);
  if (own === rate) {
    const block = Math.ceil(QUANTUM / call) * call;
    const uneven = block % QUANTUM ? QUANTUM - 1 : 0; // a block ends within a quantum
    return { block, delay: latency + block - call + uneven };
  }
  const ratio = rate / own;
  const block = QUANTUM * Math.ceil((call * ratio) / QUANTUM);
  const [there, back] = [new Resampler(rate, own).half, new Resampler(own, rate).half];
  return { block, delay: Math.ceil((latency + back) * ratio) + there + block + 2 };
}

export class LiveBlocks {
  /** @param {Separator} separator @param {Source[]} sources @param {number} channels @param {number} rate the context's
   * @param {MessagePort} port to the audio thread @param {(error: Error) => void} failed */
  constructor(separator, sources, channels, rate, port, failed) {
    this.separator = separator;
    this.sources = sources;
    this.channels = channels;
    this.own = separator.manifest.sample_rate_hz;
    this.rate = rate;
    this.port = port;
    this.over = false;
    this.next = 0; // the sample that the next block begins with, unless some were left out
    this.run = this.begin(0);
    this.done = Promise.resolve();
    port.onmessage = ({ data }) => {
      this.done = this.done.then(() => this.take(data)).catch((error) => {
        if (!this.over) failed(error);
        this.over = true;
      });
    };
  }

  /** What blocks are separated by from sample `base` on. @param {number} base */
  begin(base) {
    const { separator, sources, channels, own, rate } = this;
    const resamplers = (/** @type {number} */ count, /** @type {number} */ from, /** @type {number} */ to) =>
      Array.from({ length: count }, () => new Resampler(from, to));
    /** @type {Float32Array[]} */
    const held = Array.from({ length: channels }, () => new Float32Array(0)); // of what the sources are taken away
    return {
      stream: separator.stream(sources, channels, Math.round((base * own) / rate)),
      there: resamplers(channels, rate, own),
      back: resamplers((sources.length + 1) * channels, own, rate),
      held,
      given: base, // the first sample that is not given yet
    };
  }

  /** @param {Block} given */
  async take({ start, block }) {
    if (this.over) return;
    const begun = performance.now();
    const length = block.length / this.channels;
    if (start !== this.next) this.run = this.begin(start);
    this.next = start + length;
    const { run } = this;
    const rows = run.there.map((one, c) => one.push(block.subarray(c * length, (c + 1) * length)));
    run.held = run.held.map((row, c) => concatenated([row, rows[c]]));
    const done = await run.stream.push(rows);
    const ready = done[0][0].length;
    const left = run.held.map((row) => row.slice(0, ready));
    run.held = run.held.map((row) => row.slice(ready));
    residual(left, done);
    const out = [...done, left].flat().map((row, k) => run.back[k].push(row));
    const count = out[0].length;
    const flat = concatenated(out);
    /** @type {import("./live_processor.js").Piece} */
    const piece = { start: run.given, rows: flat, count, ms: performance.now() - begun };
    run.given += count;
    this.port.postMessage(piece, [flat.buffer]);
  }

  /** No more blocks are taken; gives when the last one is done. */
  end() {
    this.over = true;
    this.port.close();
    return this.done;
  }
}
