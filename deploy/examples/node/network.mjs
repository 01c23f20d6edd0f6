/**
 * @file The networks: FM, and DeepFM over the same rows.
 *
 * All sums are in double precision. The trainer's networks use single precision, so probabilities
 * differ from its own by rounding only (README.md has the bound).
 */

import { SnapshotError, tensor } from "./safetensors.mjs";

/** @typedef {import("./features.mjs").Example} Example */
/** @typedef {import("./snapshot.mjs").Spec} Spec */
/** @typedef {import("./safetensors.mjs").Tensors} Tensors */
/** @typedef {import("./safetensors.mjs").Numbers} Numbers */

/** @type {Record<string, (z: number) => number>} */
const ACTIVATIONS = {
  relu: (z) => Math.max(0, z),
  tanh: Math.tanh,
  sigmoid: (z) => 1 / (1 + Math.exp(-z)),
};

/** FM, and DeepFM where there are dense layers. A row of the table is [V (K), w, state]. */
export class Network {
  #table;
  #width;
  #intercept;
  #layers;

  /** @param {Spec} spec @param {Tensors} tensors */
  constructor(spec, tensors) {
    this.fields = spec.fields;
    this.size = spec.embedding_dim;
    this.#width = tensors.table?.shape[1] ?? 0;
    this.#table = tensor(tensors, "table", [2 ** spec.table_bits, this.#width]);
    if (this.#width <= this.size)
      throw new SnapshotError(`a row of ${this.#width} numbers holds no embedding`);
    this.#intercept = spec.table_optimizer === "online" ? tensor(tensors, "intercept", [2])[0] : 0;
    if (spec.model === "fm") this.#intercept += tensor(tensors, "dense.bias", [])[0];
    this.activation = ACTIVATIONS[spec.activation === "paper" ? "relu" : spec.activation];
    this.#layers =
      spec.model === "deepfm" ? denseLayers(tensors, spec.fields * spec.embedding_dim) : [];
  }

  /** @param {Example} example */
  logit({ ids, multipliers }) {
    const v = new Float64Array(this.fields * this.size);
    let logit = this.#intercept;
    for (let field = 0; field < this.fields; field++) {
      const start = ids[field] * this.#width;
      const x = multipliers[field];
      logit += x * this.#table[start + this.size];
      for (let k = 0; k < this.size; k++) v[field * this.size + k] = x * this.#table[start + k];
    }
    return logit + this.#products(v) + this.#network(v);
  }

  /** Sum <v_i, v_j> over the pairs of fields. @param {Float64Array} v */
  #products(v) {
    let products = 0;
    for (let k = 0; k < this.size; k++) {
      let total = 0;
      let squares = 0;
      for (let at = k; at < v.length; at += this.size) {
        total += v[at];
        squares += v[at] * v[at];
      }
      products += (total * total - squares) / 2;
    }
    return products;
  }

  /** @param {Float64Array} v */
  #network(v) {
    if (!this.#layers.length) return 0;
    const last = this.#layers.length - 1;
    return this.#layers.reduce(
      (a, layer, at) => affine(a, layer, at < last ? this.activation : null),
      v,
    )[0];
  }
}

/**
 * Return sigma(W a + b). @param {Float64Array} a @param {{weight: Numbers, bias: Numbers}} layer
 * @param {((z: number) => number) | null} activation
 */
function affine(a, { weight, bias }, activation) {
  const out = new Float64Array(bias.length);
  for (let row = 0, at = 0; row < out.length; row++) {
    let sum = bias[row];
    for (let i = 0; i < a.length; i++, at++) sum += weight[at] * a[i];
    out[row] = activation ? activation(sum) : sum;
  }
  return out;
}

/**
 * Return the dense layers in their order, the output neuron last.
 * @param {Tensors} tensors @param {number} inputs
 */
function denseLayers(tensors, inputs) {
  const prefix = "dense.deep.layers.";
  const numbers = Object.keys(tensors).filter(
    (name) => name.startsWith(prefix) && name.endsWith(".bias"),
  );
  return numbers
    .map((name) => Number(name.split(".")[3]))
    .sort((a, b) => a - b)
    .map((number) => {
      const [outputs] = tensors[`${prefix}${number}.bias`].shape;
      const weight = tensor(tensors, `${prefix}${number}.weight`, [outputs, inputs]);
      const bias = tensor(tensors, `${prefix}${number}.bias`, [outputs]);
      inputs = outputs;
      return { weight, bias };
    });
}
