// What the checkpoint tells: scores before and after later tasks, and where the masks lie.

import { byId, colourOf, fillSelect, make } from "./parts.js"

const [LABEL, GAP, HEAD, HIGH] = [34, 6, 18, 170] // px of the map
const EXPLAINED = "A strip runs over the rows of B: the stronger its colour, the more the task owns."
const SHORT = { self_attn: "", mlp: "", _proj: "" }

/** The table of scores. */
export function showForgetting(report) {
  const place = byId("forgetting")
  if (!report?.scores.length) {
    const why = report ? "This checkpoint stores no scores." : "No checkpoint is loaded."
    place.replaceChildren(make("p", { class: "hint", textContent: why }))
    return
  }
  const last = report.tasks.at(-1)?.name
  const rows = report.scores.map((row) => {
    const name = row.evaluation.startsWith(row.task) ? row.evaluation : `${row.task}: ${row.evaluation}`
    return make(
      "tr",
      {},
      make("th", { scope: "row", textContent: name }, make("small", { textContent: ` ${row.metric}, ${row.count}` })),
      make("td", { textContent: shown(row.as_trained, row.metric) }),
      make("td", { textContent: shown(row.all, row.metric) }),
      change(row, row.task === last),
    )
  })
  const columns = ["evaluation", "as trained", "all tasks", "change"]
  const head = columns.map((text) => make("th", { scope: "col", textContent: text }))
  place.replaceChildren(
    make(
      "div",
      { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Scores" },
      make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)),
    ),
    make("p", {
      class: "hint",
      textContent: "As trained: on the day the task ended. All tasks: with every later task on as well.",
    }),
  )
}

function shown(score, metric) {
  return score === null ? "–" : score.toFixed(metric === "loss" ? 4 : 3)
}

function change(row, isLast) {
  if (row.as_trained === null || row.all === null || isLast) {
    return make("td", { class: "soft", textContent: isLast ? "last task" : "–" })
  }
  const difference = row.all - row.as_trained
  const digits = row.metric === "loss" ? 4 : 3
  if (Number(difference.toFixed(digits)) === 0) return make("td", { textContent: "none" })
  const worse = row.metric === "loss" ? difference > 0 : difference < 0
  const sign = difference > 0 ? "+" : "−"
  return make("td", {
    class: worse ? "worse" : "better",
    textContent: `${worse ? "▼" : "▲"} ${sign}${Math.abs(difference).toFixed(digits)}`,
  })
}

/** The map of masks: a row a layer, a cell a projection, in it a strip a task from the first row of B to the last. */
export class MaskMap {
  constructor() {
    this.canvas = make("canvas", { role: "img" })
    this.select = byId("map-task")
    this.select.addEventListener("change", () => this.draw())
    new ResizeObserver(() => this.draw()).observe(byId("map"))
  }

  show(report) {
    this.report = report
    const place = byId("map")
    const tasks = report?.tasks ?? []
    fillSelect(this.select, [["", "all tasks"], ...tasks.map((task, i) => [String(i), task.name])])
    if (!report?.masks) {
      const why = report ? `The masks cannot be shown: ${report.masks_missing}.` : "No checkpoint is loaded."
      place.replaceChildren(make("p", { class: "hint", textContent: why }))
      return
    }
    const { layers, kinds, cells } = arranged(report.masks.modules)
    Object.assign(this, { layers, kinds, cells })
    const legend = tasks.map((task, i) =>
      make("li", { class: `task task-${i % 8}` }, make("span", { class: "dot" }), task.name),
    )
    const few = `${Math.round(100 * free(report.masks.modules))} % of all positions are free`
    place.replaceChildren(
      make("ul", { class: "dots" }, ...legend, make("li", { class: "soft", textContent: few })),
      this.canvas,
      make("p", { class: "hint", textContent: EXPLAINED }),
      make(
        "details",
        {},
        make("summary", { textContent: "As a table" }),
        make(
          "div",
          { class: "scroll", tabIndex: 0, role: "region", "aria-label": "Positions by projection" },
          table(report, kinds),
        ),
      ),
    )
    const names = tasks.map((task) => task.name).join(", ")
    const meaning = `Map of the masks of ${names} in ${layers.length} layers; the table below has the numbers`
    this.canvas.setAttribute("aria-label", meaning)
    this.draw()
  }

  draw() {
    if (!this.report?.masks || !this.canvas.isConnected) return
    const chosen = this.select.value === "" ? this.report.tasks.map((_, i) => i) : [Number(this.select.value)]
    const width = byId("map").clientWidth
    const cell = (width - LABEL - GAP * (this.kinds.length - 1)) / this.kinds.length
    const strip = Math.min(10, Math.max(2, Math.floor(HIGH / (this.layers.length * chosen.length))))
    const high = strip * chosen.length
    const step = high + (this.layers.length > 12 ? 2 : GAP)
    const context = prepared(this.canvas, width, HEAD + step * this.layers.length)
    const [soft, pale] = ["hint", "track"].map(colourOf)
    const colours = this.report.tasks.map((_, i) => colourOf(`ink-${i % 8}`))
    context.font = `11px ${getComputedStyle(document.body).fontFamily}`
    context.fillStyle = soft
    this.kinds.forEach((kind, i) => context.fillText(kind, LABEL + i * (cell + GAP), 11, cell))
    const every = Math.ceil(14 / step)
    this.layers.forEach((layer, row) => {
      if (row % every === 0) {
        context.fillStyle = soft
        context.fillText(layer, 0, HEAD + row * step + Math.min(high, 14) / 2 + 4, LABEL - 6)
      }
      this.kinds.forEach((kind, column) => {
        const module = this.cells.get(`${layer}/${kind}`)
        if (!module) return
        const [x, y] = [LABEL + column * (cell + GAP), HEAD + row * step]
        context.globalAlpha = 1
        context.fillStyle = pale
        context.fillRect(x, y, cell, high)
        chosen.forEach((task, i) => {
          context.fillStyle = colours[task]
          const bins = module.rows[task]
          bins.forEach((share, bin) => {
            context.globalAlpha = Math.min(1, 0.06 + (share / 1000) * 1.9)
            const left = x + (cell * bin) / bins.length
            context.fillRect(left, y + i * strip, cell / bins.length + 0.3, strip - (strip > 3 ? 1 : 0))
          })
        })
        context.globalAlpha = 1
      })
    })
  }
}

function prepared(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1
  canvas.width = Math.round(width * ratio)
  canvas.height = Math.round(height * ratio)
  canvas.style.width = `${width}px`
  canvas.style.height = `${height}px`
  const context = canvas.getContext("2d")
  context.scale(ratio, ratio)
  return context
}

/** model.layers.3.self_attn.q_proj → layer 3, kind q. */
function arranged(modules) {
  const cells = new Map()
  const [layers, kinds] = [new Set(), new Set()]
  for (const module of modules) {
    const parts = module.name.split(".")
    const layer = parts.find((part) => /^\d+$/.test(part)) ?? "–"
    const kind = Object.entries(SHORT).reduce((name, [long, short]) => name.replace(long, short), parts.at(-1))
    layers.add(layer)
    kinds.add(kind)
    cells.set(`${layer}/${kind}`, module)
  }
  return { layers: [...layers], kinds: [...kinds], cells }
}

function free(modules) {
  const total = (name) => modules.reduce((sum, module) => sum + module[name], 0)
  return total("free") / total("positions")
}

function table(report, kinds) {
  const head = ["projection", ...report.tasks.map((task) => task.name), "free"]
  const rows = kinds.map((kind) => {
    const modules = report.masks.modules.filter((module) => module.name.split(".").at(-1).startsWith(kind))
    const numbers = report.tasks.map((_, i) => modules.reduce((sum, module) => sum + module.owned[i], 0))
    const left = modules.reduce((sum, module) => sum + module.free, 0)
    return make(
      "tr",
      {},
      make("th", { scope: "row", textContent: kind }),
      ...[...numbers, left].map((number) => make("td", { textContent: number.toLocaleString("en") })),
    )
  })
  return make(
    "table",
    {},
    make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col", textContent: text })))),
    make("tbody", {}, ...rows),
  )
}
