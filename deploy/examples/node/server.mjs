/**
 * @file Serve what a run publishes: `node server.mjs --state DIR [--port 9200]`.
 *
 *     POST /predict   {"rows": [{FIELD: VALUE}, ...]} -> {"probabilities": [...], "snapshot": NAME, ...}
 *     GET  /healthz   200 while the server runs
 *     GET  /readyz    200 once a model is loaded
 */

import { readFile } from "node:fs/promises";
import { createServer } from "node:http";
import { setTimeout } from "node:timers/promises";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";

import { Hasher, InvalidFeatures } from "./features.mjs";
import { loadModel } from "./model.mjs";
import { SnapshotError } from "./safetensors.mjs";
import { openSnapshot, publicKey, readPointer } from "./snapshot.mjs";

const POLL_MILLISECONDS = 200;
const RETRY_MILLISECONDS = 2000; // a refused snapshot is read as a whole again
const LARGEST_BODY_BYTES = 4 << 20;
const MOST_ROWS = 10_000;

/** @typedef {import("./snapshot.mjs").Pointer} Pointer */

/** Follow the run that is loaded first. A snapshot that does not verify leaves the model there. */
export class Follower {
  /** @type {{pointer: Pointer, names: object, predict: (rows: unknown[]) => number[]} | null} */
  loaded = null;
  /** Why what is published is not served, "" if all is well. */
  refusal = "";

  /** @param {string} state @param {import("node:crypto").KeyObject | null} key */
  constructor(state, key = null) {
    this.state = state;
    this.key = key;
  }

  /** Load the published snapshot if it is newer than the loaded one. */
  async poll() {
    try {
      const pointer = await readPointer(this.state, this.key);
      if (!pointer || !this.#isNews(pointer)) {
        this.refusal = "";
        return;
      }
      const { manifest, tensors } = await openSnapshot(this.state, pointer, this.key);
      const hasher = new Hasher(manifest.schema);
      const model = await loadModel(manifest, tensors);
      const predict = (/** @type {unknown[]} */ rows) =>
        rows.map((row, at) => model(hasher.example(row, at)));
      const published = manifest.learner?.model ?? "blend";
      const names = { snapshot: pointer.snapshot, run: pointer.run, model: published };
      this.loaded = { pointer, names, predict };
      this.refusal = "";
      console.error(`serving ${pointer.snapshot}`);
    } catch (error) {
      const refusal = String(error instanceof Error ? error.message : error);
      if (refusal !== this.refusal) console.error(`refused: ${refusal}`);
      this.refusal = refusal;
    }
  }

  /** @param {Pointer} pointer */
  #isNews(pointer) {
    const loaded = this.loaded?.pointer;
    if (!loaded) return true;
    if (pointer.run !== loaded.run) {
      throw new SnapshotError(
        `snapshot ${pointer.snapshot} is of run ${pointer.run}; restart to serve it`,
      );
    }
    if (pointer.epoch !== loaded.epoch) return pointer.epoch > loaded.epoch;
    return pointer.sequence > loaded.sequence;
  }
}

/** An answer that is an error. */
class Refused extends Error {
  /** @param {number} status @param {string} reason @param {string} message */
  constructor(status, reason, message) {
    super(message);
    this.status = status;
    this.reason = reason;
  }
}

const noModel = () => new Refused(503, "no_model", "no snapshot is loaded yet");

/** @param {import("node:http").IncomingMessage} request */
async function readRows(request) {
  const chunks = [];
  let size = 0;
  for await (const chunk of request) {
    size += chunk.length;
    if (size > LARGEST_BODY_BYTES) {
      throw new Refused(413, "too_large", `the body has more than ${LARGEST_BODY_BYTES} bytes`);
    }
    chunks.push(chunk);
  }
  /** @type {any} */
  let body;
  try {
    body = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(Buffer.concat(chunks)));
  } catch (error) {
    const { message } = /** @type {Error} */ (error);
    throw new Refused(400, "malformed", `the body is not JSON: ${message}`);
  }
  if (!Array.isArray(body?.rows) || Object.keys(body).length > 1) {
    throw new Refused(400, "malformed", 'the form is {"rows": [{"field": value, ...}, ...]}');
  }
  if (body.rows.length > MOST_ROWS) {
    throw new Refused(413, "too_many_rows", `the request has more than ${MOST_ROWS} rows`);
  }
  return body.rows;
}

/** @param {Follower} follower @param {import("node:http").IncomingMessage} request */
async function answer(follower, request) {
  const route = `${request.method} ${request.url}`;
  if (route === "GET /healthz") return { ok: true };
  if (route === "POST /predict") {
    const rows = await readRows(request);
    if (!follower.loaded) throw noModel();
    const { predict, names } = follower.loaded; // one model for all rows
    return { probabilities: predict(rows), ...names };
  }
  if (route !== "GET /readyz") throw new Refused(404, "path", `there is no ${route}`);
  if (!follower.loaded) throw noModel();
  return follower.loaded.names;
}

/** Return the status and the body of an answer that is an error. @param {unknown} error */
function refusal(error) {
  if (error instanceof Refused) {
    return { status: error.status, body: { error: error.message, reason: error.reason } };
  }
  if (error instanceof InvalidFeatures) {
    const { message, reason, row, field } = error;
    return { status: 422, body: { error: message, reason, row, field: field ?? undefined } };
  }
  console.error(error);
  return { status: 500, body: { error: "internal error", reason: "internal" } };
}

/** @param {Follower} follower */
export function makeServer(follower) {
  return createServer(async (request, response) => {
    const { status, body } = await answer(follower, request)
      .then((body) => ({ status: 200, body }))
      .catch(refusal);
    const headers = { "content-type": "application/json" };
    response.writeHead(status, status === 503 ? { ...headers, "retry-after": "1" } : headers);
    response.end(JSON.stringify(body));
  });
}

async function main() {
  const { values } = parseArgs({
    options: {
      state: { type: "string" },
      host: { type: "string", default: "127.0.0.1" },
      port: { type: "string", default: "9200" },
      "public-key": { type: "string" },
    },
  });
  if (!values.state) throw new Error("--state is missing: the state directory of a run");
  const key = values["public-key"] ? publicKey(await readFile(values["public-key"], "utf8")) : null;
  const follower = new Follower(values.state, key);
  const server = makeServer(follower);
  server.listen(Number(values.port), values.host, () => {
    const address = /** @type {import("node:net").AddressInfo} */ (server.address());
    console.log(`http://${address.address}:${address.port}`);
  });
  const stop = new AbortController();
  for (const signal of ["SIGTERM", "SIGINT"]) process.once(signal, () => stop.abort());
  while (!stop.signal.aborted) {
    await follower.poll();
    const pause = follower.refusal ? RETRY_MILLISECONDS : POLL_MILLISECONDS;
    await setTimeout(pause, undefined, { signal: stop.signal }).catch(() => {});
  }
  server.close();
  server.closeIdleConnections();
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) await main();
