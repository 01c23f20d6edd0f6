/** @file The published model of a snapshot: one of its models, or the blend of several. */

import { Linear } from "./linear.mjs";
import { Network } from "./network.mjs";
import { SnapshotError, tensor } from "./safetensors.mjs";

/** @typedef {import("./features.mjs").Example} Example */
/** @typedef {import("./snapshot.mjs").Spec} Spec */
/** @typedef {import("./safetensors.mjs").Tensors} Tensors */
/** @typedef {{logit: (example: Example) => number}} Model */

const CLIP = 12; // of the logits that the stack reads
const EPSILON = 1e-15;

/** @param {number} logit */
function probability(logit) {
  const e = Math.exp(-Math.abs(logit));
  return Math.min(Math.max((logit >= 0 ? 1 : e) / (1 + e), EPSILON), 1 - EPSILON);
}

/**
 * Return the model of a specification.
 * @param {Spec} spec @param {Tensors} tensors @returns {Model}
 */
export function makeModel(spec, tensors) {
  if (spec.model === "lr") return new Linear(spec, tensors);
  if (spec.model === "fm" || spec.model === "deepfm") return new Network(spec, tensors);
  throw new SnapshotError(
    `this example computes lr, fm, deepfm and their blend, not ${spec.model}`,
  );
}

/** The blend: the mean of the members' and the stack's probabilities under weights `omega`. */
export class Blend {
  #omega;
  #u;

  /**
   * A member is null if it was left out of the run.
   * @param {Tensors} tensors @param {(Model | null)[]} members
   */
  constructor(tensors, members) {
    this.members = members;
    this.#omega = tensor(tensors, "omega", [members.length + 1]);
    this.#u = tensor(tensors, "u", [members.length + 1]);
  }

  /** @param {Example} example */
  probability(example) {
    const m = this.members.length;
    let z = this.#u[m];
    let mixed = 0;
    let weight = 0;
    this.members.forEach((member, at) => {
      const logit = member ? member.logit(example) : NaN;
      if (!Number.isFinite(logit)) return; // a member without a logit does not take part
      z += this.#u[at] * Math.min(Math.max(logit, -CLIP), CLIP);
      mixed += this.#omega[at] * probability(logit);
      weight += this.#omega[at];
    });
    if (weight === 0) return NaN;
    return (mixed + this.#omega[m] * probability(z)) / (weight + this.#omega[m]);
  }
}

/**
 * Return the function from an example to its click probability, by the published model.
 * @param {import("./snapshot.mjs").Manifest} manifest
 * @param {(stem: string) => Promise<Tensors>} read
 * @returns {Promise<(example: Example) => number>}
 */
export async function loadModel(manifest, read) {
  if (manifest.learner) {
    const model = makeModel(manifest.learner, await read("model"));
    return (example) => 1 / (1 + Math.exp(-model.logit(example)));
  }
  const members = [];
  for (const name of manifest.blend) {
    const stem = `${name}.model`;
    const present = `${stem}.safetensors` in manifest.files;
    members.push(present ? makeModel(manifest.beside[name], await read(stem)) : null);
  }
  const blend = new Blend(await read("model"), members);
  return (example) => blend.probability(example);
}
