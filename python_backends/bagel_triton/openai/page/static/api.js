// The server's HTTP API: readiness, the model's name, and chat completions as a stream of chunks.

const KEY = "bagel-api-key";
const PREVIEWS = 3; // of each image, the most that the server makes

export const apiKey = () => sessionStorage.getItem(KEY) ?? "";
export const setApiKey = (key) => sessionStorage.setItem(KEY, key);

/** A request that failed. `status` is null without an HTTP response, and for an error inside a streamed reply. */
export class ApiError extends Error {
  constructor(message, { status = null, requestId = null } = {}) {
    super(message);
    this.status = status;
    this.requestId = requestId;
  }
}

const headers = () => (apiKey() ? { Authorization: `Bearer ${apiKey()}` } : {});

async function request(path, options = {}) {
  try {
    return await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server cannot be reached. Is it running?");
  }
}

async function refusal(response) {
  const text = await response.text();
  let message = text.trim().slice(0, 500) || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // A gateway in front of the server has another format.
  }
  return new ApiError(message, { status: response.status, requestId: response.headers.get("x-request-id") });
}

/** `{ready, message}`: whether every model is loaded. */
export async function health() {
  const response = await request("health");
  const message = await response.json().then((body) => body.message, () => "");
  return { ready: response.ok, message: message ?? "" };
}

/** The name by which requests call the model. */
export async function modelName() {
  const response = await request("v1/models");
  if (!response.ok) throw await refusal(response);
  return (await response.json()).data[0].id;
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (pending + value).split(/\r?\n\r?\n/);
    pending = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (data.length) yield data.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}

/** The chunks of the streamed reply to `body`; throws ApiError, or AbortError once `signal` is aborted. */
export async function* complete(body, signal) {
  const previews = body.modalities.includes("image") ? { partial_images: PREVIEWS } : {};
  const streamed = { ...body, ...previews, stream: true, stream_options: { include_progress: true, include_usage: true } };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(streamed),
    signal,
  });
  if (!response.ok) throw await refusal(response);
  const requestId = response.headers.get("x-request-id");
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, { requestId });
      yield chunk;
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ApiError) throw error;
  }
  throw new ApiError("The connection ended before the reply was complete.", { requestId });
}
