// Requests to the server that served this page.

const TOKEN_KEY = "loraf-token" // in this tab only
const TRIES = 4 // of a request that a busy server refuses

/** A refusal, in the server's own words. */
export class Refusal extends Error {
  constructor(status, message, retryAfter = null) {
    super(message)
    this.status = status
    this.retryAfter = retryAfter // seconds
  }
}

export const token = {
  get: () => sessionStorage.getItem(TOKEN_KEY) ?? "",
  set: (text) => sessionStorage.setItem(TOKEN_KEY, text),
  forget: () => sessionStorage.removeItem(TOKEN_KEY),
}

/** GETs JSON. Names become snake_case, as they are in the protocol, whichever way protobuf wrote them. */
export async function get(path) {
  return snakeCase(await (await send(path, {})).json())
}

/**
 * Streams one answer.
 *
 * @param body of OpenAI's API, without `stream`.
 * @param on.piece called with each piece of text.
 * @param on.waiting called with seconds when a busy server lets us wait.
 * @returns {finish, usage, fingerprint, sentAs}; sentAs: what has become of a message with apply_task_template.
 */
export async function stream(path, body, on, signal) {
  const request = { ...body, stream: true, stream_options: { include_usage: true } }
  const response = await patiently(() => send(path, { body: request, signal }), on.waiting, signal)
  const result = { finish: "", usage: null, fingerprint: "", sentAs: response.headers.get("loraf-prompt") ?? "" }
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return result
    const message = JSON.parse(data)
    if (message.error) throw new Refusal(message.error.code ?? 500, message.error.message ?? "the answer was cut off")
    const choice = message.choices?.[0]
    const text = choice?.delta?.content ?? choice?.text
    if (text) on.piece(text)
    result.finish = choice?.finish_reason ?? result.finish
    result.usage = message.usage ?? result.usage
    result.fingerprint = message.system_fingerprint ?? result.fingerprint
  }
  throw new Refusal(0, "the connection was lost before the answer ended")
}

async function send(path, { body = null, signal = null }) {
  const headers = {}
  if (token.get()) headers.Authorization = `Bearer ${token.get()}`
  if (body) headers["Content-Type"] = "application/json"
  let response
  try {
    response = await fetch(new URL(path, document.baseURI), {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "same-origin",
    })
  } catch (error) {
    if (error.name === "AbortError") throw error
    throw new Refusal(0, "the server cannot be reached")
  }
  if (!response.ok) throw await refusalOf(response)
  return response
}

async function refusalOf(response) {
  const text = await response.text()
  let message = text.trim().slice(0, 500) || response.statusText
  try {
    const { error, detail } = JSON.parse(text)
    message = error?.message ?? (typeof error === "string" ? error : null) ?? JSON.stringify(detail ?? error)
  } catch {
    // not JSON: the text itself
  }
  const after = Number.parseFloat(response.headers.get("Retry-After") ?? "")
  return new Refusal(response.status, message, Number.isFinite(after) ? after : null)
}

/** Sends again what a busy server refuses, after the time that it says. */
async function patiently(attempt, waiting, signal) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await attempt()
    } catch (error) {
      if (!(error instanceof Refusal) || error.status !== 429 || tries === TRIES) throw error
      const seconds = Math.max(error.retryAfter ?? 2 ** tries / 2, 0.2)
      waiting(seconds)
      await pause(seconds, signal)
    }
  }
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, 1000 * seconds)
    signal?.addEventListener("abort", () => {
      clearTimeout(timer)
      reject(new DOMException("stopped", "AbortError"))
    })
  })
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader()
  let buffer = ""
  try {
    for (;;) {
      const { value, done } = await reader.read()
      if (done) return
      buffer += value
      const blocks = buffer.split(/\r?\n\r?\n/)
      buffer = blocks.pop()
      for (const block of blocks) {
        const lines = block.split(/\r?\n/).filter((line) => line.startsWith("data:"))
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n")
      }
    }
  } finally {
    reader.cancel().catch(() => {})
  }
}

function snakeCase(value) {
  if (Array.isArray(value)) return value.map(snakeCase)
  if (value === null || typeof value !== "object") return value
  const name = (key) => key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`)
  return Object.fromEntries(Object.entries(value).map(([key, each]) => [name(key), snakeCase(each)]))
}
