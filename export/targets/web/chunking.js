// Where the chunks of a recording lie, and how their results are joined: the rules of avsep_runtime/chunking.py.

/** @typedef {{ start: number, left: number | null, right: number | null }} Chunk */
/** @typedef {{ clip_samples: number, context_samples: number, crossfade_samples: number, align_samples: number }} Chunking */

/** The chunks of a recording of `total` samples: starts on the grid of `align_samples`, seams in the middle of overlaps.
 * @param {number} total @param {Chunking} chunking @returns {Chunk[]} */
export function planChunks(total, { clip_samples: clip, context_samples: context, align_samples: align }) {
  if (total < 1) throw new Error("a recording without samples cannot be separated");
  if (total <= clip) return [{ start: 0, left: null, right: null }];
  let hop = clip - 2 * context;
  hop -= hop % align;
  const last = Math.ceil((total - clip) / align) * align;
  /** @type {number[]} */
  const starts = [];
  for (let start = 0; start < last; start += hop) starts.push(start);
  starts.push(last);
  const seams = starts.slice(1).map((next, k) => Math.floor((starts[k] + clip + next) / 2));
  return starts.map((start, k) => ({ start, left: k ? seams[k - 1] : null, right: seams[k] ?? null }));
}

/** A rising cosine from just above 0 to just below 1. @param {number} samples */
export function ramp(samples) {
  return Float32Array.from({ length: samples }, (_, k) => 0.5 - 0.5 * Math.cos((Math.PI * (k + 0.5)) / samples));
}

/** Joins the results of chunks, one after the other; what no later chunk can change comes out at once. */
export class Joiner {
  /** @param {number} total samples @param {number} rows signals that are joined side by side
   * @param {number} crossfade samples */
  constructor(total, rows, crossfade) {
    this.total = total;
    this.ramp = ramp(crossfade);
    /** The part of the last chunk's cross-fade that waits for the next chunk. */
    this.waiting = Array.from({ length: rows }, () => new Float32Array(crossfade));
  }

  /** Take the result of the next chunk, a signal a row from its start on; give the samples that are done, a row each.
   * @param {Chunk} chunk @param {Float32Array[]} estimate @returns {Float32Array[]} */
  add(chunk, estimate) {
    const fade = this.ramp.length;
    const half = Math.floor(fade / 2);
    const from = chunk.left === null ? 0 : chunk.left - half;
    const to = chunk.right === null ? this.total : chunk.right - half;
    return estimate.map((signal, row) => {
      const done = signal.slice(from - chunk.start, to - chunk.start);
      const waiting = this.waiting[row];
      if (chunk.left !== null) {
        for (let k = 0; k < fade; k += 1) done[k] = waiting[k] + Math.fround(this.ramp[k] * done[k]);
      }
      if (chunk.right !== null) {
        const begin = to - chunk.start;
        for (let k = 0; k < fade; k += 1) waiting[k] = this.ramp[fade - 1 - k] * signal[begin + k];
      }
      return done;
    });
  }
}
