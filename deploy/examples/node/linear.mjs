/** @file Logistic regression by FTRL-Proximal, over fields or over fields and pairs of them. */

import { fmix64 } from "./murmur3.mjs";
import { tensor } from "./safetensors.mjs";

/** @typedef {import("./features.mjs").Example} Example */
/** @typedef {import("./snapshot.mjs").Spec} Spec */
/** @typedef {import("./safetensors.mjs").Tensors} Tensors */

const GOLDEN = 0x9e3779b97f4a7c15n;

/** The weights are those of the rows (z, n) that were learned, w = 0 for all others. */
export class Linear {
  #rows;
  #weights;
  #intercept;
  #pairs;

  /** @param {Spec} spec @param {Tensors} tensors */
  constructor(spec, tensors) {
    const { alpha, beta, l1, l2 } = spec.ftrl ?? { alpha: 0.1, beta: 1, l1: 0, l2: 1 };
    const count = tensors.rows?.shape[0] ?? 0;
    this.#rows = tensor(tensors, "rows", [count]);
    const pairs = tensor(tensors, "pairs", [count, 2]);
    /** @param {number} z @param {number} n @param {number} l2 @param {number} l1 */
    const weight = (z, n, l1, l2) =>
      Math.abs(z) > l1 ? -(z - Math.sign(z) * l1) / ((beta + Math.sqrt(n)) / alpha + l2) : 0;
    this.#weights = new Float64Array(count);
    for (let at = 0; at < count; at++)
      this.#weights[at] = weight(pairs[2 * at], pairs[2 * at + 1], l1, l2);
    const [z, n] = tensor(tensors, "intercept", [2]);
    this.#intercept = weight(z, n, 0, 0);
    this.fields = spec.fields;
    this.#pairs = spec.pairs && pairColumns(spec.pairs);
  }

  /** @param {Example} example */
  logit({ ids, multipliers }) {
    const rows = this.#pairs ? this.#pairs(ids) : ids.subarray(0, this.fields);
    let sum = this.#intercept;
    // The first F columns are the fields themselves; pairs have no multiplier.
    rows.forEach(
      (row, at) => (sum += this.#weight(row) * (at < this.fields ? multipliers[at] : 1)),
    );
    return sum;
  }

  /** Return the weight of a row, 0 for one that was not learned. @param {number} row */
  #weight(row) {
    let low = 0;
    let high = this.#rows.length; // the rows ascend
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (this.#rows[middle] < row) low = middle + 1;
      else high = middle;
    }
    return this.#rows[low] === row ? this.#weights[low] : 0;
  }
}

/**
 * Return the function that makes the rows of pairs from the rows of fields (docs/events.md).
 * @param {NonNullable<Spec["pairs"]>} pairs @returns {(ids: Int32Array) => Int32Array}
 */
export function pairColumns({ columns, table_bits: bits, numbers }) {
  const mask = (1n << BigInt(bits)) - 1n;
  const salts = columns.map(([i, j]) => {
    const [a, b] = numbers ? [numbers[i], numbers[j]] : [i, j];
    return BigInt.asUintN(64, BigInt(a * 65536 + b) * GOLDEN);
  });
  return (ids) => {
    const wide = Array.from(ids, BigInt);
    return Int32Array.from(columns, ([i, j], at) =>
      Number(fmix64(((wide[i] << 32n) | wide[j]) ^ salts[at]) & mask),
    );
  };
}
