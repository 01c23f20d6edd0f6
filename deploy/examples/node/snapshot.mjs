/**
 * @file Read what a run publishes: the pointer in `latest.json`, and the snapshot that it names.
 *
 * Nothing is used before it is verified: seal, format, signature, SHA-256 and size, in the order of
 * docs/serving.md. A file is hashed and parsed from the same bytes.
 */

import { createHash, createPublicKey, verify } from "node:crypto";
import { constants } from "node:fs";
import { open, readdir, lstat } from "node:fs/promises";
import { join } from "node:path";

import { ensure, parseSafetensors } from "./safetensors.mjs";

const POINTER_FORMAT = 4;
const MANIFEST_FORMAT = 6;
const LARGEST_POINTER_BYTES = 1 << 20;
const LARGEST_MANIFEST_BYTES = 64 << 20;
const SIGNED = "stream-ctr pointer\n";
const SEAL = /,[ \n]*"sha256": ?"([0-9a-f]{64})"[ \n]*\}[ \n]*$/;
const PLAIN_NAME = /^(?!tmp-)[A-Za-z0-9_][A-Za-z0-9_.-]*$/;

/** @typedef {import("node:crypto").KeyObject} KeyObject */
/** @typedef {import("./safetensors.mjs").Tensors} Tensors */
/** @typedef {{format: number, snapshot: string, manifest_sha256: string, run: string,
 *   model: string, epoch: number, sequence: number, signature: string}} Pointer */
/** @typedef {{format: number, snapshot: string, run: string, model: string, epoch: number,
 *   sequence: number, schema: import("./features.mjs").Schema, learner?: Spec, blend: string[],
 *   beside: Record<string, Spec>,
 *   files: Record<string, {sha256: string, bytes: number}>}} Manifest */
/** @typedef {{model: string, fields: number, embedding_dim: number, activation: string,
 *   table_bits: number, table_optimizer: string, precision: string,
 *   ftrl?: {alpha: number, beta: number, l1: number, l2: number},
 *   pairs?: {columns: [number, number][], table_bits: number, numbers?: number[]}}} Spec */

/** @param {Uint8Array} bytes */
const sha256 = (bytes) => createHash("sha256").update(bytes).digest("hex");

/** Return the Ed25519 public key in a PEM file's text. @param {string} pem */
export function publicKey(pem) {
  const key = createPublicKey(pem);
  if (key.asymmetricKeyType !== "ed25519") throw new Error("the public key is not Ed25519");
  return key;
}

/**
 * Return the bytes of a regular file of at most `largest` bytes, or of exactly `size` bytes.
 * @param {string} path @param {{largest?: number, size?: number}} limits
 */
async function read(path, { largest = Infinity, size }) {
  const file = await open(path, constants.O_RDONLY | constants.O_NOFOLLOW | constants.O_NONBLOCK);
  try {
    const status = await file.stat();
    ensure(status.isFile(), `${path} is not a regular file`);
    ensure(status.size <= largest, `${path} has ${status.size} bytes, at most ${largest} are read`);
    ensure(
      size === undefined || status.size === size,
      `${path} has ${status.size} bytes, the manifest says ${size}`,
    );
    return await file.readFile();
  } finally {
    await file.close();
  }
}

/**
 * Return a sealed document. Its last key is the SHA-256 of all bytes before it.
 * @param {Buffer} bytes @param {number} format @param {string} name @returns {any}
 */
function unsealed(bytes, format, name) {
  const text = bytes.toString("latin1"); // one character a byte, so that indices are those of bytes
  const seal = SEAL.exec(text.slice(-100));
  ensure(seal, `${name} is damaged: it does not end with its own SHA-256`);
  const body = bytes.subarray(0, text.length - seal[0].length);
  ensure(sha256(body) === seal[1], `${name} is damaged: its SHA-256 is not the one that it says`);
  const document = JSON.parse(`${body.toString("utf8")}}`);
  ensure(
    document.format === format,
    `${name} has format ${document.format}, format ${format} is read`,
  );
  return document;
}

/**
 * Return the pointer of a state directory, or null before the first snapshot is published.
 * @param {string} state @param {KeyObject | null} key @returns {Promise<Pointer | null>}
 */
export async function readPointer(state, key = null) {
  const path = join(state, "latest.json");
  /** @type {Buffer} */
  let bytes;
  try {
    bytes = await read(path, { largest: LARGEST_POINTER_BYTES });
  } catch (error) {
    if (/** @type {NodeJS.ErrnoException} */ (error).code === "ENOENT") return null;
    throw error;
  }
  const pointer = unsealed(bytes, POINTER_FORMAT, path);
  ensure(PLAIN_NAME.test(pointer.snapshot), `${path} names no snapshot`);
  if (key) {
    // The signature covers all other keys, as compact JSON in the order of the document.
    const signed = Buffer.from(SIGNED + JSON.stringify({ ...pointer, signature: "" }));
    const good = verify(null, signed, key, Buffer.from(pointer.signature, "hex"));
    ensure(good, `the pointer to ${pointer.snapshot} is not signed with the expected key`);
  }
  return pointer;
}

/**
 * Return the manifest of the snapshot that a pointer names, and a function that reads a file of it.
 * @param {string} state @param {Pointer} pointer @param {KeyObject | null} key
 * @returns {Promise<{manifest: Manifest, tensors: (stem: string) => Promise<Tensors>}>}
 */
export async function openSnapshot(state, pointer, key = null) {
  const folder = join(state, "snapshots", pointer.snapshot);
  const path = join(folder, "manifest.json");
  const bytes = await read(path, { largest: LARGEST_MANIFEST_BYTES });
  if (key) {
    const signature = await read(join(folder, "manifest.sig"), { size: 64 });
    ensure(verify(null, bytes, key, signature), `${path} is not signed with the expected key`);
  }
  ensure(
    sha256(bytes) === pointer.manifest_sha256,
    `${path} is not the one that the pointer names`,
  );
  /** @type {Manifest} */
  const manifest = unsealed(bytes, MANIFEST_FORMAT, path);
  for (const name of /** @type {const} */ (["run", "snapshot", "sequence", "model"])) {
    ensure(manifest[name] === pointer[name], `${path}: its ${name} is not that of its pointer`);
  }
  ensure(pointer.epoch >= manifest.epoch, `${path} is of a later epoch than its pointer`);
  await requireFiles(folder, manifest);
  return { manifest, tensors: (stem) => readTensors(folder, stem, manifest) };
}

/**
 * Require every file of the manifest and no other.
 * @param {string} folder @param {Manifest} manifest
 */
async function requireFiles(folder, manifest) {
  const expected = new Map(Object.entries(manifest.files));
  for (const name of await readdir(folder)) {
    if (["manifest.json", "manifest.sig"].includes(name)) continue;
    const entry = expected.get(name);
    ensure(entry, `${join(folder, name)} is not in the manifest`);
    const status = await lstat(join(folder, name));
    ensure(
      status.isFile() && status.size === entry.bytes,
      `${join(folder, name)} is not the file of the manifest`,
    );
    expected.delete(name);
  }
  ensure(expected.size === 0, `${folder} lacks ${[...expected.keys()].join(", ")}`);
}

/**
 * Return the tensors with a stem. A table that a run on several ranks wrote is in shards beside them.
 * @param {string} folder @param {string} stem @param {Manifest} manifest @returns {Promise<Tensors>}
 */
async function readTensors(folder, stem, manifest) {
  const tensors = await readFile(folder, `${stem}.safetensors`, manifest);
  const names = Object.keys(manifest.files).filter((name) => name.startsWith(`${stem}.shard-`));
  if (names.length === 0) return tensors;
  ensure(!tensors.table, `${join(folder, stem)} has a table in shards and another one`);
  const shards = [];
  for (let index = 0; index < names.length; index++) {
    const [number, count] = [index, names.length].map((each) => String(each).padStart(2, "0"));
    const name = `${stem}.shard-${number}-of-${count}.safetensors`;
    shards.push((await readFile(folder, name, manifest)).table);
  }
  const [rows, floats] = shards[0].shape;
  const data = new Float32Array(shards.length * rows * floats);
  shards.forEach((shard, index) => {
    ensure(shard.shape.join() === shards[0].shape.join(), `${folder} has shards of other shapes`);
    data.set(shard.data, index * rows * floats);
  });
  return { ...tensors, table: { shape: [shards.length * rows, floats], data } };
}

/**
 * Return the tensors of a file.
 * @param {string} folder @param {string} name @param {Manifest} manifest @returns {Promise<Tensors>}
 */
async function readFile(folder, name, manifest) {
  const entry = manifest.files[name];
  ensure(entry && PLAIN_NAME.test(name), `${folder} has no file ${name}`);
  const bytes = await read(join(folder, name), { size: entry.bytes });
  ensure(sha256(bytes) === entry.sha256, `${join(folder, name)} was changed after it was written`);
  return parseSafetensors(bytes);
}
