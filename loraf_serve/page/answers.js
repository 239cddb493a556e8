// The answers of the mix and of the pinned sets, side by side.

import { Refusal, stream } from "./api.js"
import { marks, missing, words } from "./diff.js"
import { make } from "./parts.js"

const NEAR_END = 24 // px; someone who has scrolled up is left there

/** One set and its answer. */
export class Card {
  /** @param buttons shown beside the set's name. */
  constructor(title, buttons) {
    this.title = make("h3", { class: "mono" })
    this.text = ""
    this.done = false
    this.body = make("div", { class: "answer", role: "group", tabIndex: 0 })
    this.state = make("p", { class: "state" })
    this.element = make(
      "article",
      { class: "card" },
      make("div", { class: "head" }, this.title, ...buttons),
      this.body,
      this.state,
    )
    this.rename(title)
    this.clear("not asked yet")
  }

  rename(title) {
    this.name = title
    this.title.textContent = title
    this.body.setAttribute("aria-label", `Answer of ${title}`)
  }

  /** Drops the answer: it belongs to another set or question. */
  clear(state) {
    this.text = ""
    this.done = false
    this.body.replaceChildren()
    this.say(state)
  }

  say(state, isError = false) {
    this.state.textContent = state
    this.state.classList.toggle("error", isError)
  }

  add(piece) {
    const atEnd = this.body.scrollHeight - this.body.scrollTop - this.body.clientHeight < NEAR_END
    this.text += piece
    this.body.append(piece)
    if (atEnd) this.body.scrollTop = this.body.scrollHeight
  }

  /** Marks the words that the reference does not have, and says how many. */
  compare(reference) {
    if (!this.done || !reference.done) return
    const marked = marks(reference.text, this.text)
    this.body.replaceChildren(
      ...runs(marked).map(({ text, same }) => (same ? text : make("mark", { textContent: text }))),
    )
    const [other, lost] = [marked.filter((mark) => !mark.same).length, missing(reference.text, this.text)]
    const total = words(this.text).length
    const some = other === total ? "differs from the mix" : `${other} of ${total} words differ from the mix`
    const verdict = other ? some : lost ? `${lost} words of the mix are missing` : "same as the mix"
    this.state.textContent = `${verdict} · ${this.facts}`
  }

  /**
   * Asks for an answer.
   *
   * @param requests to try in order: {path, body, unless}. Where a refusal matches `unless`, the next one is sent.
   * @returns the request that was answered, or null.
   */
  async ask(requests, signal) {
    this.clear("waiting …")
    this.element.setAttribute("aria-busy", "true")
    const began = performance.now()
    try {
      const { result, request } = await this.first(requests, signal)
      const seconds = ((performance.now() - began) / 1000).toFixed(1)
      const tokens = result.usage ? `${result.usage.completion_tokens} tokens · ` : ""
      const cut = result.finish === "length" ? " · cut off at the limit" : ""
      const how = howSent(request, result.sentAs)
      this.facts = `${tokens}${seconds} s${cut}${how && ` · ${how}`}`
      this.done = true
      this.say(this.facts)
      this.element.title = result.fingerprint && `answered by ${result.fingerprint}`
      return request
    } catch (error) {
      if (error.name === "AbortError") this.say("stopped")
      else {
        this.say(told(error), true)
        if (error.status === 401) throw error
      }
      return null
    } finally {
      this.element.removeAttribute("aria-busy")
    }
  }

  async first(requests, signal) {
    const on = {
      piece: (text) => {
        if (!this.text) this.say("answering …")
        this.add(text)
      },
      waiting: (seconds) => this.say(`the server is busy; trying again in ${seconds.toFixed(1)} s`),
    }
    for (const [i, request] of requests.entries()) {
      try {
        return { result: await stream(request.path, request.body, on, signal), request }
      } catch (error) {
        const mayTryNext = error instanceof Refusal && error.status === 400 && i + 1 < requests.length
        if (!mayTryNext || !request.unless.test(error.message)) throw error
      }
    }
  }
}

/** Neighbouring words of one kind as one text; the white space after a run of marked ones is not marked. */
function runs(marked) {
  const joined = []
  for (const { word, same } of marked) {
    if (joined.at(-1)?.same === same) joined.at(-1).text += word
    else joined.push({ text: word, same })
  }
  return joined.flatMap(({ text, same }) => {
    const end = text.trimEnd().length
    return same ? [{ text, same }] : [{ text: text.slice(0, end), same }, { text: text.slice(end), same: true }]
  })
}

/** How a question was sent, unless as a chat. @param told by the server, of a message with apply_task_template. */
function howSent(request, told) {
  if (!request.body.messages || told === "plain") return "as a plain prompt"
  return told.startsWith("task template") ? `in the ${told}` : ""
}

function told(error) {
  const kinds = {
    401: "no valid token: ",
    403: "not allowed: ",
    429: "the server is busy: ",
    503: "not serving: ",
  }
  return `${kinds[error.status] ?? ""}${error.message}`
}
