// Boxes of a source over time.

/** @typedef {[number, number, number, number]} Box left, top, right and bottom as fractions of the frame */
/** @typedef {{ time: number, box: Box }[]} Track boxes in order of time; one holds until the next, the first before, too */

export const WHOLE = /** @type {Box} */ ([0, 0, 1, 1]);

/** The box of a track at a moment. @param {Track} track @param {number} time @returns {Box} */
export function boxAt(track, time) {
  let found = track[0].box;
  for (const entry of track) if (entry.time <= time + 1e-9) found = entry.box;
  return found;
}

/** Let a box hold from a moment on. One that is drawn in the place of the whole frame is the first, which holds before,
 * too. @param {Track} track @param {number} time @param {Box} box */
export function setBox(track, time, box) {
  if (track.length === 1 && track[0].box.every((edge, k) => edge === WHOLE[k])) track.pop();
  const there = track.find((entry) => Math.abs(entry.time - time) < 1e-6);
  if (there) there.box = box;
  else track.push({ time, box });
  track.sort((a, b) => a.time - b.time);
}

/** A track without the boxes after a moment. @param {Track} track @param {number} time @returns {Track} */
export const upTo = (track, time) => track.filter((entry, k) => k === 0 || entry.time <= time + 1e-9);

/** A file of boxes, as avsep separate reads it. @param {{ name: string, track: Track }[]} sources */
export function boxesText(sources) {
  /** @type {Map<number, string[]>} */
  const seconds = new Map();
  for (const { name, track } of sources) {
    for (const { time, box } of track) {
      const line = `${JSON.stringify(name)}: [${box.map((edge) => Number(edge.toFixed(6))).join(", ")}]`;
      seconds.set(time, [...(seconds.get(time) ?? []), line]);
    }
  }
  const times = [...seconds.keys()].sort((a, b) => a - b);
  return `{\n${times.map((time) => `"${time}": {${seconds.get(time)?.join(", ")}}`).join(",\n")}\n}\n`;
}
