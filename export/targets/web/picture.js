// Spectrograms as pictures.

/** @typedef {import("./spectrogram.js").Picture} Picture */

const RANGE_DB = 70;
/** From quiet to loud: black, violet, red, orange, pale yellow. */
const COLOURS = [[0, 0, 4], [40, 17, 89], [114, 31, 129], [183, 55, 121], [241, 96, 93], [254, 176, 120], [252, 253, 191]];

/** The colour of a share from 0 to 1. @param {number} share */
export function colour(share) {
  const place = Math.max(0, Math.min(1, share)) * (COLOURS.length - 1);
  const low = Math.min(Math.floor(place), COLOURS.length - 2);
  return COLOURS[low].map((value, k) => Math.round(value + (place - low) * (COLOURS[low + 1][k] - value)));
}

/** Draw a picture; its brightness is that of `whole`, so that pictures compare. @param {HTMLCanvasElement} canvas
 * @param {Picture} picture @param {Picture} whole */
export function draw(canvas, picture, whole) {
  let top = -100;
  for (const value of whole.decibels) top = Math.max(top, value);
  const { width, height, decibels } = picture;
  canvas.width = width;
  canvas.height = height;
  const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext("2d"));
  const image = context.createImageData(width, height);
  for (let x = 0; x < width; x += 1) {
    for (let row = 0; row < height; row += 1) {
      const [red, green, blue] = colour(1 + (decibels[x * height + row] - top) / RANGE_DB);
      image.data.set([red, green, blue, 255], 4 * ((height - 1 - row) * width + x));
    }
  }
  context.putImageData(image, 0, 0);
}
