/**
 * @file Feature values become rows of the embedding table, by the published hash (docs/events.md).
 *
 *     field_seed = low 32 bits of murmur3_x64_128(field name, hash_seed).h1
 *     row        = murmur3_x64_128(value as UTF-8, field_seed).h1 & (2^table_bits - 1)
 */

import { murmur3 } from "./murmur3.mjs";

/** @typedef {{fields: [string, string][], table_bits: number, numeric_encoding: string,
 *   buckets_per_octave: number, hash_seed: number, crosses: string[][],
 *   bucket_edges: Record<string, number[]>, value_scales: Record<string, number>}} Schema
 *   The `schema` of a manifest. */
/** @typedef {string | number | null} Value  A parsed value; null is missing. */
/** @typedef {{ids: Int32Array, multipliers: Float64Array}} Example
 *   `ids` [F + C], those of the cross products last; `multipliers` [F] of the embeddings. */

const MISSING = Uint8Array.of(0xff); // no UTF-8 text contains this byte
const LARGEST_MULTIPLIER = 4;
const LARGEST_UNSCALED_MULTIPLIER = 1e6;
const WRAPPERS = ["features", "kind"];

const encoder = new TextEncoder();

/** A row that training would reject, or would leave a part of unread. */
export class InvalidFeatures extends Error {
  /**
   * @param {string} reason @param {number} row @param {string | null} field
   * @param {string} message
   */
  constructor(reason, row, field, message) {
    super(`row ${row}: ${message}`);
    this.reason = reason;
    this.row = row;
    this.field = field;
  }
}

/**
 * Return the bucket of a number: logarithmic, or by fitted edges.
 * @param {number} x @param {number[] | undefined} edges @param {number} perOctave
 */
export function bucket(x, edges, perOctave) {
  /** @param {number} u */
  const octaves = (u) => Math.floor(perOctave * Math.log2(1 + Math.min(u, Number.MAX_VALUE)));
  if (!edges) return Math.sign(x) * Math.floor(perOctave * Math.log2(1 + Math.abs(x)));
  const first = edges[0];
  const last = edges[edges.length - 1];
  if (x < first) return -octaves((first - x) / (last - first));
  if (x >= last) return edges.length + octaves((x - last) / (last - first));
  return edges.filter((edge) => edge <= x).length;
}

/**
 * Parse a value as training does. A number that JavaScript has rounded is refused: the text of its
 * digits hashes to the same row.
 * @param {string} name @param {string} kind @param {unknown} value @param {number} row
 * @returns {Value}
 */
function parse(name, kind, value, row) {
  /** @param {string} expected */
  const wrong = (expected) =>
    new InvalidFeatures("wrong_type", row, name, `${JSON.stringify(name)} must be ${expected}`);
  if (value === undefined || value === null) return null;
  if (kind === "numeric") {
    if (typeof value === "number" && Number.isFinite(value)) return value;
    throw wrong("a finite number or null");
  }
  if (typeof value === "string" && value.isWellFormed()) return value;
  if (typeof value === "boolean" || Number.isSafeInteger(value)) return String(value);
  throw wrong("text, a boolean or an integer below 2^53; send a larger integer as text");
}

/** Hashes rows of features by the schema of a manifest. */
export class Hasher {
  #mask;
  #names;

  /** @param {Schema} schema */
  constructor(schema) {
    this.schema = schema;
    this.#mask = (1n << BigInt(schema.table_bits)) - 1n;
    /** @param {Uint8Array} name */
    const seed = (name) => murmur3(name, schema.hash_seed) & 0xffffffffn;
    this.fields = schema.fields.map(([name, kind]) => ({
      name,
      kind,
      seed: seed(encoder.encode(name)),
      weighed: kind === "numeric" && schema.numeric_encoding !== "buckets",
    }));
    const names = this.fields.map((field) => field.name);
    this.#names = new Set(names);
    this.crosses = schema.crosses.map((members) => {
      const texts = members.flatMap((name, at) =>
        (at ? [0xff] : []).concat([...encoder.encode(name)]),
      );
      return {
        members: members.map((name) => names.indexOf(name)),
        seed: seed(Uint8Array.from(texts)),
      };
    });
  }

  /**
   * Return the ids of one row, an object from field names to values.
   * @param {unknown} row @param {number} index @returns {Example}
   */
  example(row, index = 0) {
    const values = this.#values(row, index);
    const hashes = this.fields.map((field, at) =>
      murmur3(this.#hashed(field, values[at]), field.seed),
    );
    for (const { members, seed } of this.crosses) {
      const words = BigUint64Array.from(members, (at) => hashes[at]); // little-endian machines only
      hashes.push(murmur3(new Uint8Array(words.buffer), seed));
    }
    return {
      ids: Int32Array.from(hashes, (hash) => Number(hash & this.#mask)),
      multipliers: Float64Array.from(this.fields, (field, at) =>
        this.#multiplier(field, values[at]),
      ),
    };
  }

  /** @param {unknown} row @param {number} index @returns {Value[]} */
  #values(row, index) {
    if (typeof row !== "object" || row === null || Array.isArray(row)) {
      throw new InvalidFeatures("wrong_type", index, null, "features are an object by field name");
    }
    const given = new Map(Object.entries(row));
    const [unknown] = [...given.keys()].filter((name) => !this.#names.has(name));
    if (unknown !== undefined && WRAPPERS.some((name) => given.has(name))) {
      throw new InvalidFeatures(
        "wrapped_event",
        index,
        null,
        "a whole event; send its 'features' only",
      );
    }
    if (unknown !== undefined) {
      throw new InvalidFeatures(
        "unknown_field",
        index,
        unknown,
        `there is no field ${JSON.stringify(unknown)}`,
      );
    }
    const values = this.fields.map(({ name, kind }) => parse(name, kind, given.get(name), index));
    if (values.every((value) => value === null)) {
      throw new InvalidFeatures("no_field", index, null, "a value of at least one field is needed");
    }
    return values;
  }

  /** @param {{name: string, weighed: boolean}} field @param {Value} value @returns {Uint8Array} */
  #hashed({ name, weighed }, value) {
    if (value === null) return MISSING;
    if (weighed) return encoder.encode("value");
    if (typeof value === "string") return encoder.encode(value);
    const { bucket_edges: edges, buckets_per_octave: perOctave } = this.schema;
    return encoder.encode(String(bucket(value, edges[name], perOctave)));
  }

  /** @param {{name: string, weighed: boolean}} field @param {Value} value */
  #multiplier({ name, weighed }, value) {
    if (!weighed || typeof value !== "number") return 1;
    const scale = this.schema.value_scales[name];
    const log = this.schema.numeric_encoding === "log_value";
    const x = (log ? Math.sign(value) * Math.log1p(Math.abs(value)) : value) / (scale ?? 1);
    const largest = scale === undefined ? LARGEST_UNSCALED_MULTIPLIER : LARGEST_MULTIPLIER;
    return Math.fround(Math.min(Math.max(x, -largest), largest));
  }
}
