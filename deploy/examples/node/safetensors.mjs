/** @file Read tensors from the bytes of a safetensors file. */

/** @typedef {Float32Array | Float64Array | Int32Array} Numbers */
/** @typedef {Record<string, {shape: number[], data: Numbers}>} Tensors */

/** Why a pointer or a snapshot is not served. */
export class SnapshotError extends Error {}

/**
 * Throw a `SnapshotError` unless the condition holds.
 * @param {unknown} condition @param {string} message @returns {asserts condition}
 */
export function ensure(condition, message) {
  if (!condition) throw new SnapshotError(message);
}

/** @typedef {Float32ArrayConstructor | Float64ArrayConstructor | Int32ArrayConstructor} Type */

/** @type {Record<string, Type>} */
const TYPES = { F32: Float32Array, F64: Float64Array, I32: Int32Array };

/**
 * Return the tensors of a safetensors file: the length of the header (8 bytes), the header as JSON,
 * and the little-endian numbers.
 * @param {Uint8Array} bytes @returns {Tensors}
 */
export function parseSafetensors(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  ensure(bytes.length >= 8, "a safetensors file has at least 8 bytes");
  const start = 8 + Number(view.getBigUint64(0, true));
  ensure(start <= bytes.length, "the header of a safetensors file is longer than the file");
  const header = JSON.parse(
    new TextDecoder("utf-8", { fatal: true }).decode(bytes.subarray(8, start)),
  );
  /** @type {Tensors} */
  const tensors = {};
  for (const [
    name,
    {
      dtype,
      shape,
      data_offsets: [from, to],
    },
  ] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    const type = TYPES[dtype];
    ensure(type, `tensor ${name} has the type ${dtype}, which no model here uses`);
    const count = shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
    const size = count * type.BYTES_PER_ELEMENT;
    ensure(
      from >= 0 && to - from === size && start + to <= bytes.length,
      `tensor ${name} is not in the file`,
    );
    const inFile = bytes.subarray(start + from, start + to);
    const aligned = (bytes.byteOffset + start + from) % type.BYTES_PER_ELEMENT === 0;
    const numbers = aligned ? inFile : new Uint8Array(inFile);
    const memory = /** @type {ArrayBuffer} */ (numbers.buffer);
    tensors[name] = { shape, data: new type(memory, numbers.byteOffset, count) };
  }
  return tensors;
}

/**
 * Return the numbers of a tensor after a check of its shape.
 * @param {Tensors} tensors @param {string} name @param {number[]} shape
 */
export function tensor(tensors, name, shape) {
  const found = tensors[name];
  ensure(
    found && found.shape.join() === shape.join(),
    `tensor ${name} has shape [${found?.shape}], expected [${shape}]`,
  );
  return found.data;
}
