// The page: connects the controls with requests, answers, reports and the address.

import { get, Refusal, token } from "./api.js"
import { Card } from "./answers.js"
import { curl, grpc, openai } from "./calls.js"
import { Mixer } from "./mixer.js"
import { byId, copy, copyButton, fillSelect, make } from "./parts.js"
import { MaskMap, showForgetting } from "./report.js"
import { modelName, onlyTask } from "./sets.js"
import { askForToken, followTheme } from "./settings.js"
import * as view from "./view.js"

const [CHAT, COMPLETIONS] = ["v1/chat/completions", "v1/completions"]
// Refusals after which a question is sent in another form.
const NO_CHAT = /the model has no chat template/
const NO_TEMPLATE = /the task's template/
const FORMS = [
  ["chat", "a chat message"],
  ["template", "a prompt in the task’s template"],
  ["plain", "a plain prompt"],
]
const DEFAULT_PINS = ["base"]

const mixer = new Mixer(() => changed())
const map = new MaskMap()
let server = null
let adapters = []
let adapter = null // the one that is mixed; null: none is loaded
let pinned = [] // cards
let running = null // AbortController
const tag = make("span", { class: "tag" })
const mix = new Card("", [tag])

// --- what the page shows

/** Shows the sets, the calls and the address of this moment. */
function changed() {
  if (!server) return
  if (!mix.text && !running) mix.rename(mixer.text)
  tag.textContent = mix.name === mixer.text ? "the mix" : "the mix before"
  byId("pin").disabled = pinned.some((card) => card.name === mixer.text)
  showCalls()
  history.replaceState(null, "", view.write(now()))
}

function now() {
  return {
    adapter: adapters.length > 1 ? adapter.name : null,
    mix: mixer.text,
    pins: pinned.map((card) => card.name),
    question: byId("question").value,
    form: byId("form").value,
    maxTokens: byId("max-tokens").value,
    temperature: byId("temperature").value,
  }
}

function pin(name) {
  if (pinned.some((card) => card.name === name)) return
  const label = { textContent: "Remove", "aria-label": `Remove ${name}` }
  const remove = make("button", { type: "button", class: "quiet", ...label })
  const card = new Card(name, [remove])
  remove.addEventListener("click", () => {
    pinned = pinned.filter((other) => other !== card)
    card.element.remove()
    changed()
    byId(byId("pin").disabled ? "question" : "pin").focus()
  })
  pinned.push(card)
  byId("answers").append(card.element)
}

function showCalls() {
  const set = mixer.text
  const { path, body } = requestsFor(set)[0]
  const base = document.baseURI.split("#")[0]
  const secret = Boolean(token.get())
  const texts = {
    curl: curl(base, path, body, secret),
    "Python, openai": openai(base, path, body, secret),
    "gRPC, loraf-client": grpc(base, path, body, adapter?.name ?? "", set, onlyTask(set, adapter)),
  }
  const place = byId("calls")
  if (!place.children.length) {
    for (const name of Object.keys(texts)) {
      const code = make("pre", { tabIndex: 0, role: "region", "aria-label": name })
      const button = copyButton(() => code.textContent, "Copy", `Copy the call for ${name}`)
      place.append(make("div", {}, make("div", { class: "head" }, make("h3", { textContent: name }), button), code))
    }
  }
  Object.values(texts).forEach((text, i) => (place.children[i].querySelector("pre").textContent = text))
}

function fail(error) {
  byId("problem-text").textContent = error.message
  byId("problem").hidden = false
  if (!server) byId("server").textContent = "Not connected"
}

// --- asking

/** The requests for a set, in the order in which they are tried. */
function requestsFor(set) {
  const prompt = byId("question").value
  const body = {
    model: modelName(adapter, set),
    max_tokens: byId("max-tokens").valueAsNumber || 1,
    temperature: byId("temperature").valueAsNumber || 0,
  }
  const messages = [{ role: "user", content: prompt }]
  const requests = {
    chat: { path: CHAT, body: { ...body, messages }, unless: NO_CHAT },
    template: { path: CHAT, body: { ...body, messages, apply_task_template: true }, unless: NO_TEMPLATE },
    plain: { path: COMPLETIONS, body: { ...body, prompt }, unless: /^$/ },
  }
  return FORMS.slice(FORMS.findIndex(([form]) => form === byId("form").value)).map(([form]) => requests[form])
}

async function ask() {
  const cards = [mix, ...pinned]
  running = new AbortController()
  mix.rename(mixer.text)
  cards.forEach((card) => card.clear("waiting for its turn …"))
  byId("asked").textContent = byId("question").value
  byId("asked").hidden = false
  byId("problem").hidden = true
  byId("stop").hidden = false
  byId("send").disabled = true
  byId("said").textContent = `Asking ${cards.length} ${cards.length === 1 ? "set" : "sets"}`
  const { signal } = running
  let unauthorised = false
  const one = async (card) => {
    const answered = await card.ask(requestsFor(card.name), signal)
    if (answered?.body.apply_task_template && byId("form").value === "chat") byId("form").value = "template"
  }
  try {
    if (server.backend === "merged") for (const card of cards) await one(card)
    else await Promise.all(cards.map(one))
    pinned.forEach((card) => card.compare(mix))
    const complete = cards.filter((card) => card.done).length
    byId("said").textContent = signal.aborted ? "Stopped" : `${complete} of ${cards.length} answers are complete`
  } catch (error) {
    running.abort()
    unauthorised = error.status === 401
    if (!unauthorised) throw error
  } finally {
    running = null
    byId("stop").hidden = true
    byId("send").disabled = false
    changed()
  }
  if (unauthorised && (await askForToken("The token was refused."))) await ask()
}

// --- starting

async function connect() {
  byId("problem").hidden = true
  try {
    const answer = await get("loraf/v1/server")
    adapters = (await get("loraf/v1/adapters")).adapters ?? []
    server = answer
  } catch (error) {
    if (error.status === 401 && (await askForToken(token.get() && "The token was refused."))) return connect()
    return fail(error)
  }
  for (const each of adapters) Object.assign(each, { tasks: each.tasks ?? [], sets: each.sets ?? [] })
  byId("server").textContent = `${server.model}, backend ${server.backend}`
  byId("forget-token").hidden = !token.get()
  byId("honest").hidden = server.backend !== "merged"
  byId("honest").textContent =
    "This server adds one set at a time to the weights (backend merged), so the answers come one after the other."
  fillSelect(byId("adapter"), adapters.map((each) => [each.name, each.name]))
  byId("adapter-field").hidden = adapters.length < 2
  await restore(view.read(location.hash))
}

/** Shows a view; what it leaves open is as at the first visit. */
async function restore(wanted) {
  running?.abort()
  const usual = adapters.find((each) => each.tasks.length) ?? adapters[0] // a token may be for none of an adapter's tasks
  adapter = adapters.find((each) => each.name === wanted.adapter) ?? usual ?? null
  byId("adapter").value = adapter?.name ?? ""
  pinned = []
  mix.clear("not asked yet")
  byId("answers").replaceChildren(mix.element)
  const set = (id, value) => value !== null && (byId(id).value = value)
  set("question", wanted.question)
  set("max-tokens", wanted.maxTokens)
  set("temperature", wanted.temperature)
  if (FORMS.some(([form]) => form === wanted.form)) byId("form").value = wanted.form
  for (const name of wanted.pins ?? DEFAULT_PINS) pin(name)
  mixer.show(adapter)
  if (wanted.mix) mixer.set(wanted.mix)
  changed()
  byId("send").disabled = Boolean(running)
  await report()
}

async function report() {
  const place = adapter
  let content = null
  try {
    content = place && (await get(`loraf/v1/adapters/${encodeURIComponent(place.name)}/report`))
  } catch (error) {
    if (!(error instanceof Refusal)) throw error
    byId("forgetting").textContent = byId("map").textContent = `Not available: ${error.message}`
    return
  }
  if (place !== adapter) return // another one was chosen in the meantime
  showForgetting(content)
  map.show(content)
}

function wire() {
  fillSelect(byId("form"), FORMS)
  followTheme(() => map.draw())
  byId("answers").append(mix.element)
  byId("pin").addEventListener("click", () => {
    pin(mixer.text)
    changed()
  })
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault()
    if (server && !running) ask().catch(fail)
  })
  byId("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit()
  })
  byId("stop").addEventListener("click", () => running?.abort())
  byId("retry").addEventListener("click", () => connect().catch(fail))
  byId("adapter").addEventListener("change", () => {
    restore({ ...now(), adapter: byId("adapter").value, pins: null, mix: null }).catch(fail)
  })
  byId("copy-link").addEventListener("click", (event) => copy(location.href, event.target, "Copy link to this view"))
  byId("forget-token").addEventListener("click", () => {
    token.forget()
    location.reload()
  })
  for (const id of ["question", "form", "max-tokens", "temperature"]) byId(id).addEventListener("input", changed)
  window.addEventListener("hashchange", () => restore(view.read(location.hash)).catch(fail))
}

wire()
connect().catch(fail)
