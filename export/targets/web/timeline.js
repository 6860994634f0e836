// Which frames a chunk sees: the rules of avsep_runtime/timeline.py.

/** @typedef {{ data: Uint8Array, count: number, rate: number }} Frames `count` frames behind each other, `rate` a second;
 *   frame i covers the seconds [i, i + 1) / rate */
/** @typedef {{ name: string, object: Frames | null, motion: Frames | null, moves: boolean }} Timeline what is seen of a
 *   source; `moves` is false of a picture that is held */
/** @typedef {import("./bundle.js").VisualSource} VisualSource */

export const OBJECT_RATE_HZ = 1;
export const MOTION_RATE_HZ = 8;

/** Halves go up. @param {number} value */
const round = (value) => Math.floor(value + 0.5);

/** The moment, in seconds of the recording, that a chunk is looked up at. @param {string} role @param {number} start
 * @param {number} clip @param {number} total @param {number} rate */
export function middleOf(role, start, clip, total, rate) {
  const length = role === "object" ? Math.min(clip, total - start) : clip;
  return (start + Math.floor(length / 2)) / rate;
}

/** @param {Frames} frames @param {number[]} indices */
function picked(frames, indices) {
  const size = frames.data.length / frames.count;
  const kept = indices.map((i) => Math.max(0, Math.min(i, frames.count - 1)));
  const data = new Uint8Array(kept.length * size);
  kept.forEach((i, k) => data.set(frames.data.subarray(i * size, (i + 1) * size), k * size));
  return { indices: kept, data };
}

/** The frames of an object around a moment. @param {Timeline} timeline @param {VisualSource} visual @param {number} middle */
export function objectFrames(timeline, visual, middle) {
  if (!timeline.object) throw new Error(`${timeline.name} has no frames of its object`);
  const count = Math.max(1, visual.frames);
  const first = Math.floor(middle * timeline.object.rate + 1e-9) - Math.floor(count / 2);
  return picked(timeline.object, Array.from({ length: count }, (_, k) => first + k));
}

/** The frames of a chunk's movement, at the encoder's rate. @param {Timeline} timeline @param {VisualSource} visual
 * @param {number} middle @param {number} duration */
export function motionFrames(timeline, visual, middle, duration) {
  if (!timeline.motion) throw new Error(`${timeline.name} has no frames of its movement`);
  const rate = visual.rate_hz || timeline.motion.rate;
  const count = Math.max(1, round(duration * rate));
  const first = round((middle - duration / 2) * rate);
  const own = timeline.motion.rate;
  const index = (/** @type {number} */ i) => (rate === own ? i : Math.floor(((i + 0.5) / rate) * own + 1e-9));
  return picked(timeline.motion, Array.from({ length: count }, (_, k) => index(first + k)));
}
