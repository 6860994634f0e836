// On the audio thread: cuts what comes in into blocks for the worker, and plays what comes back a fixed delay later. It
// computes nothing itself: 128 samples are due every few milliseconds, and a call of the graph takes longer than that
// every now and then. While it waits for a block, silence is played and counted; what comes too late is left out, so
// that the stream stays where it is.

/** @typedef {{ start: number, rows: Float32Array, count: number, ms: number }} Piece rows of `count` samples behind each
 *   other, of each channel of each output; of the stream from sample `start` on. `ms`: of its computing */
/** @typedef {{ at: number, missing: number, dropouts: number, reserve: number, ms: number[], peaks: number[] }} LiveReport
 *   `at`: samples of the stream so far; `missing` samples in `dropouts` silences; `reserve`: the least number of samples
 *   that a piece came early by since the last report, and `peaks` of each output since then */

const audio = /** @type {any} */ (globalThis); // AudioWorkletGlobalScope
const REPORT_S = 0.25;

class LiveProcessor extends audio.AudioWorkletProcessor {
  /** @param {{ processorOptions: { block: number, channels: number, delay: number, most: number } }} options `block`:
   * samples that the worker is given at once; `delay`: samples; `most`: blocks that may wait for an answer */
  constructor({ processorOptions: { block, channels, delay, most } }) {
    super();
    this.size = block;
    this.channels = channels;
    this.delay = delay;
    this.most = most;
    this.block = new Float32Array(channels * block);
    this.filled = 0;
    this.waiting = 0;
    this.behind = false;
    /** @type {Piece[]} */
    this.pieces = [];
    this.begin = NaN; // the context's frame that is the stream's first sample
    this.soon = false;
    this.first = NaN; // the stream's first sample that came in
    this.at = 0;
    this.ended = false;
    this.silent = false;
    this.missing = 0;
    this.dropouts = 0;
    this.reported = 0;
    this.reserve = Infinity;
    /** @type {number[]} */
    this.ms = [];
    /** @type {number[]} */
    this.peaks = [];
    this.port.onmessage = (/** @type {MessageEvent} */ { data }) => {
      if (data.worker) {
        this.worker = data.worker;
        this.worker.onmessage = (/** @type {MessageEvent} */ event) => this.answered(event.data);
      }
      if (data.begin !== undefined) this.begin = data.begin;
      if (data.soon) this.soon = true;
      if (data.end) this.ended = true;
    };
  }

  /** @param {Piece} piece */
  answered(piece) {
    this.waiting -= 1;
    this.ms.push(piece.ms);
    if (!piece.count) return;
    this.pieces.push(piece);
    this.reserve = Math.min(this.reserve, piece.start - (this.at - this.delay));
  }

  /** @param {Float32Array[][]} inputs @param {Float32Array[][]} outputs */
  process([input], outputs) {
    if (this.ended) return false;
    if (this.soon) {
      this.begin = audio.currentFrame;
      this.soon = false;
    }
    const at = audio.currentFrame - this.begin;
    if (!(at >= 0)) return true;
    if (Number.isNaN(this.first)) this.first = at;
    const length = outputs[0][0].length;
    this.take(input, at, length);
    this.give(outputs, at - this.delay, length);
    this.at = at + length;
    if (this.at - this.reported >= REPORT_S * audio.sampleRate) this.report();
    return true;
  }

  /** @param {Float32Array[]} input without channels where nothing sounds @param {number} at @param {number} length */
  take(input, at, length) {
    for (let k = 0; k < length; ) {
      const count = Math.min(length - k, this.size - this.filled);
      for (let c = 0; c < this.channels; c += 1) {
        const into = c * this.size + this.filled;
        if (input[c]) this.block.set(input[c].subarray(k, k + count), into);
        else this.block.fill(0, into, into + count);
      }
      this.filled += count;
      k += count;
      if (this.filled < this.size) continue;
      this.filled = 0;
      // What a worker that is far behind gives would always be too late: it gets nothing until it has done what it has,
      // and begins anew then.
      if (this.waiting >= this.most) this.behind = true;
      if (this.waiting === 0) this.behind = false;
      if (!this.worker || this.behind) continue;
      this.waiting += 1;
      this.worker.postMessage({ start: at + k - this.size, block: this.block }, [this.block.buffer]);
      this.block = new Float32Array(this.channels * this.size);
    }
  }

  /** @param {Float32Array[][]} outputs zeros @param {number} from of the stream @param {number} length */
  give(outputs, from, length) {
    let there = 0;
    while (this.pieces.length && this.pieces[0].start + this.pieces[0].count <= from) this.pieces.shift();
    for (const { start, rows, count } of this.pieces) {
      const [begin, end] = [Math.max(start, from), Math.min(start + count, from + length)];
      if (begin >= end) break;
      outputs.forEach((output, n) => output.forEach((row, c) => {
        const place = (n * this.channels + c) * count - start;
        row.set(rows.subarray(place + begin, place + end), begin - from);
      }));
      there += end - begin;
    }
    outputs.forEach((output, n) => {
      let peak = this.peaks[n] ?? 0;
      for (const row of output) for (const value of row) peak = Math.max(peak, Math.abs(value));
      this.peaks[n] = peak;
    });
    const wanted = Math.min(length, Math.max(0, from + length - this.first)); // before it there is nothing to play
    if (there < wanted) {
      this.missing += wanted - there;
      if (!this.silent) this.dropouts += 1;
    }
    this.silent = there < wanted;
  }

  report() {
    const { at, missing, dropouts, reserve, ms, peaks } = this;
    this.port.postMessage({ at, missing, dropouts, reserve, ms, peaks });
    this.reported = at;
    this.reserve = Infinity;
    this.ms = [];
    this.peaks = [];
  }
}

audio.registerProcessor("avsep-live", LiveProcessor);

export {};
