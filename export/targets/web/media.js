// Sound of files that the browser decodes, at their own rate: a browser resamples with a filter of its own otherwise.

const HEAD = 1 << 20;
const MOST_BYTES = 2_000_000_000; // that a browser hands over in one piece

/** @param {Uint8Array} bytes @param {string} word @param {number} from */
function find(bytes, word, from = 0) {
  const codes = [...word].map((c) => c.charCodeAt(0));
  for (let at = from; at + codes.length <= bytes.length; at += 1) {
    if (codes.every((code, k) => bytes[at + k] === code)) return at;
  }
  return -1;
}

/** The box `moov` of an MP4 file, which may stand at its end. @param {Blob} file */
async function movieBox(file) {
  let place = 0;
  while (place + 16 <= file.size) {
    const view = new DataView(await file.slice(place, place + 16).arrayBuffer());
    let size = view.getUint32(0);
    if (size === 1) size = Number(view.getBigUint64(8));
    if (size === 0) size = file.size - place;
    if (size < 8) return null;
    if (view.getUint32(4) === 0x6d6f6f76) return new Uint8Array(await file.slice(place, place + size).arrayBuffer());
    place += size;
  }
  return null;
}

const MPEG_RATES = [44100, 48000, 32000];
const ADTS_RATES = [96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350];

/** The sample rate that a compressed file states, in Hz; null where none is found.
 * @param {Blob} file @returns {Promise<number | null>} */
export async function statedRate(file) {
  const rate = await lookForRate(file);
  return rate !== null && rate >= 8000 && rate <= 192_000 ? rate : null; // what browsers decode to
}

/** @param {Blob} file @returns {Promise<number | null>} */
async function lookForRate(file) {
  const bytes = new Uint8Array(await file.slice(0, HEAD).arrayBuffer());
  const view = new DataView(bytes.buffer);
  if (bytes.length < 64) return null;
  if (find(bytes.subarray(0, 12), "ftyp") === 4) {
    const movie = await movieBox(file);
    if (!movie) return null;
    for (const kind of ["mp4a", "Opus", "fLaC", "alac", "ac-3", "ec-3"]) {
      for (let at = find(movie, "stsd"); at >= 0; at = find(movie, "stsd", at + 4)) {
        if (find(movie.subarray(at + 16, at + 20), kind) === 0) return (movie[at + 44] << 8) | movie[at + 45];
      }
    }
    return null;
  }
  if (find(bytes.subarray(0, 4), "fLaC") === 0) return (bytes[18] << 12) | (bytes[19] << 4) | (bytes[20] >> 4);
  if (find(bytes.subarray(0, 4), "OggS") === 0) {
    if (find(bytes.subarray(0, 200), "OpusHead") >= 0) return 48_000;
    const vorbis = find(bytes.subarray(0, 200), "\x01vorbis");
    return vorbis < 0 ? null : view.getUint32(vorbis + 12, true);
  }
  if (view.getUint32(0) === 0x1a45dfa3) {
    // Matroska and WebM: the element SamplingFrequency, a float of 4 or 8 bytes
    for (let at = 0; at + 10 < bytes.length; at += 1) {
      if (bytes[at] !== 0xb5 || (bytes[at + 1] !== 0x84 && bytes[at + 1] !== 0x88)) continue;
      const rate = bytes[at + 1] === 0x84 ? view.getFloat32(at + 2) : view.getFloat64(at + 2);
      if (Number.isInteger(rate) && rate >= 8000 && rate <= 192_000) return rate;
    }
    return null;
  }
  let at = 0;
  if (find(bytes.subarray(0, 3), "ID3") === 0) {
    at = 10 + ((bytes[6] << 21) | (bytes[7] << 14) | (bytes[8] << 7) | bytes[9]);
    if (at + 4 > bytes.length) return null;
  }
  if (bytes[at] === 0xff && (bytes[at + 1] & 0xf6) === 0xf0) return ADTS_RATES[(bytes[at + 2] >> 2) & 15] ?? null;
  if (bytes[at] === 0xff && (bytes[at + 1] & 0xe0) === 0xe0) {
    const version = (bytes[at + 1] >> 3) & 3; // 3: MPEG-1, 2: MPEG-2, 0: MPEG-2.5
    const rate = MPEG_RATES[(bytes[at + 2] >> 2) & 3];
    return rate ? rate / (version === 3 ? 1 : version === 2 ? 2 : 4) : null;
  }
  return null;
}

/** The sound of a file that the browser knows, at its own rate where that is stated. Throws an Error with a line for
 * people. @param {File} file @returns {Promise<{ channels: Float32Array[], rate: number, stated: boolean }>} */
export async function decode(file) {
  if (file.size > MOST_BYTES) {
    throw new Error(`${file.name} has ${(file.size / 1e9).toFixed(1)} GB, more than a browser decodes: give its sound as WAV`);
  }
  const found = await statedRate(file);
  const rate = found ?? 48_000;
  let buffer;
  try {
    buffer = await new OfflineAudioContext(1, 1, rate).decodeAudioData(await file.arrayBuffer());
  } catch {
    throw new Error(`${file.name} holds no sound that this browser can decode: give WAV, MP3, FLAC, OGG, MP4 or WebM`);
  }
  if (!buffer.length) throw new Error(`${file.name} holds no samples: it is empty or damaged`);
  const channels = Array.from({ length: buffer.numberOfChannels }, (_, c) => buffer.getChannelData(c));
  return { channels, rate, stated: found !== null };
}
