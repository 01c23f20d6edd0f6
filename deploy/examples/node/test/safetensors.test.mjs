import assert from "node:assert/strict";
import { test } from "node:test";

import { parseSafetensors, SnapshotError } from "../safetensors.mjs";

/** @param {object} header @param {number[]} numbers */
function file(header, numbers) {
  const text = Buffer.from(JSON.stringify(header));
  const size = Buffer.alloc(8);
  size.writeBigUInt64LE(BigInt(text.length));
  return Buffer.concat([size, text, Buffer.from(Float64Array.from(numbers).buffer)]);
}

const ENTRY = { dtype: "F64", shape: [2, 1], data_offsets: [0, 16] };

test("tensors are read wherever they lie in memory", () => {
  for (const name of ["a", "ab", "abc", "abcd"]) {
    const { [name]: found } = parseSafetensors(file({ [name]: ENTRY }, [1.5, -2]));
    assert.deepEqual(
      [found.shape, [...found.data]],
      [
        [2, 1],
        [1.5, -2],
      ],
    );
  }
});

for (const [what, damaged] of Object.entries({
  "an offset behind the end": file({ a: { ...ENTRY, data_offsets: [8, 24] } }, [1, 2]),
  "an offset before the start": file({ a: { ...ENTRY, data_offsets: [-8, 8] } }, [1, 2]),
  "a size that is not that of the shape": file({ a: { ...ENTRY, shape: [3] } }, [1, 2]),
  "an unknown type": file({ a: { ...ENTRY, dtype: "F8" } }, [1, 2]),
  "too few bytes": Buffer.from([1, 2]),
  "a header that is longer than the file": Buffer.alloc(16, 255),
})) {
  test(`a file with ${what} is refused`, () => {
    assert.throws(() => parseSafetensors(damaged), SnapshotError);
  });
}
