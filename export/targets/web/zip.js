// Zip archives as NumPy writes them: members stored or deflated, read through the list at the end.

/** @param {Uint8Array} bytes @param {"deflate-raw" | "gzip"} format @returns {Promise<Uint8Array>} */
export async function decompress(bytes, format) {
  const stream = new Blob([/** @type {BlobPart} */ (bytes)]).stream().pipeThrough(new DecompressionStream(format));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** The members of a zip by name. Throws an Error where it is damaged.
 * @param {Uint8Array} bytes @returns {Promise<[string, Uint8Array][]>} */
export async function inflate(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let end = bytes.length - 22;
  while (end >= 0 && view.getUint32(end, true) !== 0x06054b50) end -= 1;
  if (end < 0) throw new Error("it is no .npz, or was cut short");
  const count = view.getUint16(end + 10, true);
  let place = view.getUint32(end + 16, true);
  /** @type {[string, Uint8Array][]} */
  const members = [];
  for (let k = 0; k < count; k += 1) {
    if (view.getUint32(place, true) !== 0x02014b50) throw new Error("its list of members is damaged");
    const method = view.getUint16(place + 10, true);
    const packed = view.getUint32(place + 20, true);
    const [nameLength, extra, comment] = [28, 30, 32].map((at) => view.getUint16(place + at, true));
    const name = new TextDecoder().decode(bytes.subarray(place + 46, place + 46 + nameLength));
    const local = view.getUint32(place + 42, true);
    const start = local + 30 + view.getUint16(local + 26, true) + view.getUint16(local + 28, true);
    const body = bytes.subarray(start, start + packed);
    if (method !== 0 && method !== 8) throw new Error(`${name} is packed as NumPy never does`);
    members.push([name, method === 0 ? body : await decompress(body, "deflate-raw")]);
    place += 46 + nameLength + extra + comment;
  }
  return members;
}
