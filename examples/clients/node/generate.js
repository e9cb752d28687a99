'use strict';

// Draws images with a OneWord server: progress on stderr, pictures beside each other.
//
//     node generate.js "a photo of a fox" --out fox --images 2 --seed 7
//
// The server is that of ONEWORD_SERVER, the token that of ONEWORD_TOKEN, the authority of the
// server's certificate the file that ONEWORD_CA names.

const fs = require('node:fs');
const path = require('node:path');
const { randomUUID } = require('node:crypto');
const { parseArgs } = require('node:util');
const { setTimeout: sleep } = require('node:timers/promises');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const ROOT = path.resolve(__dirname, '..', '..', '..');
const GENERATION = 'protos/oneword/v1/generation.proto';
const MAX_MESSAGE_BYTES = 16 << 20;
const MAX_ATTEMPTS = 5;
const TIMEOUT_S = 120;
const AGAIN = new Set([grpc.status.UNAVAILABLE, grpc.status.RESOURCE_EXHAUSTED]);

function loadServices() {
  const definition = protoLoader.loadSync(GENERATION, {
    includeDirs: [ROOT],
    keepCase: true, // names as in the .proto files
    longs: String, // a seed has 64 bits, a number of JavaScript 53
    enums: String,
    defaults: true,
    oneofs: true,
  });
  return grpc.loadPackageDefinition(definition).oneword.v1;
}

function isOnThisMachine(address) {
  return /^(127\.\d+\.\d+\.\d+|localhost|\[::1\]):\d+$|^unix:/.test(address);
}

function credentialsFor(address) {
  if (process.env.ONEWORD_CA) {
    return grpc.credentials.createSsl(fs.readFileSync(process.env.ONEWORD_CA));
  }
  if (process.env.ONEWORD_TOKEN && !isOnThisMachine(address)) {
    throw new Error(`the token would go to ${address} in plain text; set ONEWORD_CA`);
  }
  return grpc.credentials.createInsecure();
}

function connect(address) {
  const { ImageGenerationService } = loadServices();
  return new ImageGenerationService(address, credentialsFor(address), {
    'grpc.max_receive_message_length': MAX_MESSAGE_BYTES,
    'grpc.max_send_message_length': MAX_MESSAGE_BYTES,
    'grpc.enable_retries': 0, // they are made below, with the same request_id
    'grpc.keepalive_time_ms': 330_000, // servers drop clients that ping oftener than every 5 min
  });
}

function metadata() {
  const sent = new grpc.Metadata();
  if (process.env.ONEWORD_TOKEN) {
    sent.set('authorization', `Bearer ${process.env.ONEWORD_TOKEN}`);
  }
  return sent;
}

/** How long the server wants a caller to wait, in milliseconds; 0 where it does not say. */
function pushbackMs(error) {
  const [told] = error.metadata?.get('grpc-retry-pushback-ms') ?? [];
  return /^\d+$/.test(told ?? '') ? Number(told) : 0;
}

/** One attempt: leaves what came in `drawn`, which keeps what came before. */
async function attempt(client, request, deadline, drawn) {
  for await (const response of client.Generate(request, metadata(), { deadline })) {
    switch (response.event) {
      case 'progress': {
        const { image_index: index, step, num_steps: steps } = response.progress;
        process.stderr.write(`image ${index}: step ${step} of ${steps}\n`);
        break;
      }
      case 'image': // after a break it is told again: the same
        drawn.images.set(response.image.image_index, response.image);
        break;
      case 'summary':
        drawn.summary = response.summary;
        break;
    }
  }
  if (drawn.summary === null) throw new Error('the server ended the stream without a summary');
}

/** Draws a request, again where the connection broke or the server was busy: it is drawn once. */
async function generate(client, fields) {
  const request = { request_id: randomUUID().replaceAll('-', ''), ...fields };
  const deadline = Date.now() + TIMEOUT_S * 1000; // of all attempts together
  const drawn = { images: new Map(), summary: null };
  for (let number = 1; ; number++) {
    try {
      await attempt(client, request, deadline, drawn);
      return drawn;
    } catch (error) {
      const jitter = Math.random() * Math.min(10_000, 200 * 2 ** (number - 1));
      const wait = pushbackMs(error) + jitter;
      const late = Date.now() + wait >= deadline;
      if (!AGAIN.has(error.code) || number === MAX_ATTEMPTS || late) throw error;
      await sleep(wait);
    }
  }
}

async function main() {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: {
      out: { type: 'string', default: 'oneword' },
      images: { type: 'string', default: '1' },
      steps: { type: 'string', default: '25' },
      seed: { type: 'string' },
    },
  });
  const fields = {
    prompt: positionals.join(' '),
    num_images: Number(values.images),
    num_inference_steps: Number(values.steps),
  };
  if (values.seed !== undefined) fields.seed = values.seed;
  const client = connect(process.env.ONEWORD_SERVER || '127.0.0.1:50051');
  try {
    const { images, summary } = await generate(client, fields);
    for (const [index, image] of [...images].sort(([a], [b]) => a - b)) {
      const file = `${values.out}-${index}.png`;
      fs.writeFileSync(file, image.image);
      console.log(file);
    }
    console.log(`seeds ${summary.seeds.join(', ')}; ${summary.sampler}`);
  } finally {
    client.close();
  }
}

main().catch((error) => {
  console.error(`${grpc.status[error.code] ?? 'error'}: ${error.details ?? error.message}`);
  process.exitCode = 1;
});
