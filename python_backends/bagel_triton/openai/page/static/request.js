// A request as the body of POST /v1/chat/completions, and as code that sends the same.

import { apiKey } from "./api.js";

const FOR = {
  image: ["width", "height", "num_inference_steps", "cfg_text_scale", "cfg_img_scale", "negative_prompt", "n", "seed"],
  text: ["temperature", "max_tokens", "n", "seed"],
};

/** The name of the request's task, and the verb of its button. */
export function task({ output, images }) {
  if (output === "image") return images.length ? ["Edit an image", "Edit"] : ["Text to image", "Generate"];
  return images.length ? ["Describe an image", "Ask"] : ["Chat", "Send"];
}

/** The body for `request`; settings that are not given have the server's defaults. */
export function toBody(request, model) {
  const { output, prompt, images, think, history, settings } = request;
  const text = { type: "text", text: prompt };
  const parts = images.map(({ url }) => ({ type: "image_url", image_url: { url } }));
  const content = images.length ? [text, ...parts] : prompt;
  const names = FOR[output].filter((name) => name in settings && (name !== "cfg_img_scale" || images.length));
  return {
    model,
    messages: [...history, { role: "user", content }],
    modalities: [output],
    ...(think ? { think: true } : {}),
    ...Object.fromEntries(names.map((name) => [name, settings[name]])),
  };
}

const shellWord = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** `body` with each data URL replaced by `place(index)`; `index` counts the images of all messages. */
function withoutImages(body, place) {
  let index = 0;
  const part = (item) => (item.type === "image_url" ? { ...item, image_url: { url: place(index++) } } : item);
  const message = (item) => (Array.isArray(item.content) ? { ...item, content: item.content.map(part) } : item);
  return { ...body, messages: body.messages.map(message) };
}

function imageNames(body, request) {
  const count = body.messages.flatMap((message) => (Array.isArray(message.content) ? message.content : []));
  const earlier = count.filter((part) => part.type === "image_url").length - request.images.length;
  const names = Array.from({ length: earlier }, (_, index) => `earlier-${index + 1}.png`);
  return [...names, ...request.images.map(({ name }) => name)];
}

const MARK = "\u0000"; // no prompt that can be typed holds it
const MARKED = /"\\u0000(\d+)"/g;

/** A shell command that sends the request; it reads the images from files of their names. */
export function curl(request, model) {
  const body = toBody(request, model);
  const names = imageNames(body, request);
  const json = JSON.stringify(withoutImages(body, (index) => `${MARK}${index}`), null, 2);
  const payload = json
    .replace(/(?!\\u0000)[\\`$]/g, "\\$&")
    .replace(MARKED, (_, index) => `"data:image/png;base64,$(base64 -w 0 ${shellWord(names[index])})"`);
  const lines = [
    `curl ${shellWord(new URL("v1/chat/completions", document.baseURI).href)}`,
    `-H 'Content-Type: application/json'`,
    ...(apiKey() ? [`-H "Authorization: Bearer $BAGEL_API_KEY"`] : []),
    `-d @- <<EOF${request.output === "image" ? " > reply.json" : ""}`,
  ];
  let command = `${lines.join(" \\\n  ")}\n${payload}\nEOF`;
  if (request.output === "image") {
    command += `\njq -r '.choices[0].message.content[0].image_url.url' reply.json | cut -d, -f2 | base64 -d > image.png`;
  }
  return command;
}

const INDENT = "    ";

function python(value, indent = "") {
  const inner = indent + INDENT;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const list = Array.isArray(value);
  const [open, close] = list ? ["[", "]"] : ["{", "}"];
  const items = list
    ? value.map((item) => python(item, inner))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, inner)}`);
  const flat = `${open}${items.join(", ")}${close}`;
  if (flat.length + indent.length <= 88 && !flat.includes("\n")) return flat;
  return `${open}\n${items.map((item) => `${inner}${item},\n`).join("")}${indent}${close}`;
}

const OF_OPENAI = new Set(["model", "messages", "modalities", "n", "seed", "temperature", "max_tokens"]);

/** A Python script that sends the request with OpenAI's client; it reads the images from files of their names. */
export function pythonScript(request, model) {
  const body = toBody(request, model);
  const names = imageNames(body, request);
  const { messages } = withoutImages(body, (index) => `${MARK}${index}`);
  const entries = Object.entries({ ...body, messages });
  const extra = Object.fromEntries(entries.filter(([name]) => !OF_OPENAI.has(name)));
  const own = entries.filter(([name]) => OF_OPENAI.has(name));
  if (Object.keys(extra).length) own.push(["extra_body", extra]);
  const values = own.map(([name, value]) => `${INDENT}${name}=${python(value, INDENT)},`).join("\n");
  const base = new URL("v1", document.baseURI).href;
  const images = request.output === "image";
  return [
    ...(images || names.length ? ["import base64"] : []),
    ...(apiKey() ? ["import os"] : []),
    ...(images || names.length || apiKey() ? [""] : []),
    "from openai import OpenAI",
    "",
    ...(names.length
      ? [
          "",
          "def data_url(path):",
          `${INDENT}with open(path, "rb") as file:`,
          `${INDENT}${INDENT}return "data:image/png;base64," + base64.b64encode(file.read()).decode()`,
          "",
          "",
        ]
      : []),
    `client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${apiKey() ? 'os.environ["BAGEL_API_KEY"]' : '"unused"'})`,
    "reply = client.chat.completions.create(",
    values.replace(MARKED, (_, index) => `data_url(${JSON.stringify(names[index])})`),
    ")",
    ...(images
      ? [
          "for index, image in enumerate(reply.choices[0].message.content):",
          `${INDENT}png = base64.b64decode(image["image_url"]["url"].partition(",")[2])`,
          `${INDENT}with open(f"image-{index}.png", "wb") as file:`,
          `${INDENT}${INDENT}file.write(png)`,
        ]
      : ["for choice in reply.choices:", `${INDENT}print(choice.message.content)`]),
  ].join("\n");
}
