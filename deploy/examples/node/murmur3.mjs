/** @file MurmurHash3 x64 128 by Austin Appleby, who placed it in the public domain. */

const C1 = 0x87c37b91114253d5n;
const C2 = 0x4cf5ad432745937fn;

/** @param {bigint} x */
const u64 = (x) => BigInt.asUintN(64, x);

/** @param {bigint} x @param {bigint} bits */
const rotate = (x, bits) => u64((x << bits) | (x >> (64n - bits)));

/** @param {bigint} k @param {bigint} first @param {bigint} bits @param {bigint} second */
const scramble = (k, first, bits, second) => u64(rotate(u64(k * first), bits) * second);

/** MurmurHash3's 64-bit finaliser. @param {bigint} k */
export function fmix64(k) {
  k = u64((k ^ (k >> 33n)) * 0xff51afd7ed558ccdn);
  k = u64((k ^ (k >> 33n)) * 0xc4ceb9fe1a85ec53n);
  return k ^ (k >> 33n);
}

/**
 * Return h1, the first 64 bits of the hash.
 * @param {Uint8Array} bytes @param {number | bigint} seed @returns {bigint}
 */
export function murmur3(bytes, seed = 0) {
  const size = bytes.length;
  const tail = size - (size % 16);
  const padded = new Uint8Array(tail + 16); // a word of zeros changes nothing
  padded.set(bytes);
  const words = new DataView(padded.buffer);
  let h1 = BigInt(seed);
  let h2 = h1;
  for (let at = 0; at < tail; at += 16) {
    h1 ^= scramble(words.getBigUint64(at, true), C1, 31n, C2);
    h1 = u64((rotate(h1, 27n) + h2) * 5n + 0x52dce729n);
    h2 ^= scramble(words.getBigUint64(at + 8, true), C2, 33n, C1);
    h2 = u64((rotate(h2, 31n) + h1) * 5n + 0x38495ab5n);
  }
  h2 ^= scramble(words.getBigUint64(tail + 8, true), C2, 33n, C1);
  h1 ^= scramble(words.getBigUint64(tail, true), C1, 31n, C2);
  h1 ^= BigInt(size);
  h2 ^= BigInt(size);
  h1 = u64(h1 + h2);
  h2 = u64(h2 + h1);
  return u64(fmix64(h1) + fmix64(h2));
}
