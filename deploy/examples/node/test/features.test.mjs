import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { Hasher, InvalidFeatures } from "../features.mjs";
import { pairColumns } from "../linear.mjs";
import { murmur3 } from "../murmur3.mjs";

const VECTORS = JSON.parse(
  readFileSync(new URL("../../../../docs/vectors.json", import.meta.url), "utf8"),
);

test("the hash of every vector is the published one", () => {
  for (const { hex, seed, h1 } of VECTORS.hashes) {
    assert.equal(murmur3(Buffer.from(hex, "hex"), seed).toString(16).padStart(16, "0"), h1, hex);
  }
});

for (const { about, schema, rows } of VECTORS.schemas) {
  test(`${about}: ids and multipliers are the published ones`, () => {
    const hasher = new Hasher(schema);
    for (const { features, ids, values } of rows) {
      const example = hasher.example(features);
      const numeric = hasher.fields.flatMap((field, at) => (field.weighed ? [at] : []));
      assert.deepEqual([...example.ids], ids, JSON.stringify(features));
      numeric.forEach((field, at) => {
        const found = example.multipliers[field];
        assert.ok(Math.abs(found - values[at]) <= 1e-6 * Math.abs(values[at]), `${found}`);
      });
    }
  });
}

for (const { about, table_bits, columns, numbers, rows } of VECTORS.pairs) {
  test(`${about}: rows of pairs are the published ones`, () => {
    const hash = pairColumns({ columns, table_bits, numbers: numbers ?? undefined });
    for (const each of rows) assert.deepEqual([...hash(Int32Array.from(each.ids))], each.rows);
  });
}

test("features that training would reject are refused with their reason", () => {
  const hasher = new Hasher(VECTORS.schemas[0].schema);
  const refused = [
    [{ app: "maps", ap: 1 }, "unknown_field"],
    [{ features: { app: "maps" } }, "wrapped_event"],
    [{}, "no_field"],
    [{ app: null }, "no_field"],
    [{ app: 1.5 }, "wrong_type"],
    [{ app: 2 ** 53 }, "wrong_type"],
    [{ app: "\ud800" }, "wrong_type"],
    [{ app: ["maps"] }, "wrong_type"],
    [{ age: "31" }, "wrong_type"],
    [{ age: true }, "wrong_type"],
    [JSON.parse('{"age": 1e999}'), "wrong_type"],
    [JSON.parse('{"__proto__": 1, "app": "maps"}'), "unknown_field"],
    [null, "wrong_type"],
    [[], "wrong_type"],
  ];
  for (const [features, reason] of refused) {
    assert.throws(
      () => hasher.example(features, 7),
      (error) => error instanceof InvalidFeatures && error.reason === reason && error.row === 7,
      JSON.stringify(features),
    );
  }
});
