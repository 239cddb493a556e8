// A slider for each task of the adapter.

import { byId, fillSelect, make } from "./parts.js"
import { MOST, textOf, weightsOf } from "./sets.js"

const SLIDER_MOST = 2 // most mixtures lie below; the number beside it goes from -16 to 16

export class Mixer {
  /** @param changed called after every change of a weight. */
  constructor(changed) {
    this.changed = changed
    this.weights = new Map()
    this.tasks = []
    byId("preset").addEventListener("change", (event) => {
      const preset = event.target.value
      if (preset) this.set(preset)
      event.target.value = ""
    })
  }

  get text() {
    return textOf(this.weights, this.tasks)
  }

  /** Shows the sliders of an adapter, all at 1. Null: no adapter is loaded. */
  show(adapter) {
    this.tasks = adapter ? adapter.tasks.map((task) => task.name) : []
    this.weights = new Map(this.tasks.map((name) => [name, 1]))
    this.rows = new Map(this.tasks.map((name, place) => [name, this.row(name, place)]))
    const sliders = byId("sliders")
    sliders.replaceChildren(...[...this.rows.values()].map((row) => row.element))
    const why = adapter ? "This token may use no task of the adapter" : "No adapter is loaded"
    if (!this.tasks.length) sliders.append(make("p", { textContent: `${why}: the base model answers.` }))
    this.presets(adapter)
    this.refresh()
  }

  /** Sets all weights from a text that names tasks, `all` or `base`. Returns whether it could. */
  set(text) {
    const weights = weightsOf(text, this.tasks)
    if (!weights) return false
    this.weights = weights
    this.refresh()
    return true
  }

  presets(adapter) {
    const trained = (adapter?.tasks ?? []).map((task) => [
      [...(task.trained_with ?? []), task.name].filter((name) => this.tasks.includes(name)).join("+"),
      task.name,
    ])
    const named = (adapter?.sets ?? []).map((set) => [
      textOf(new Map((set.tasks ?? []).map((task) => [task.name, task.weight])), this.tasks),
      set.name,
    ])
    const groups = [
      ["", "choose …"],
      ["all", "all tasks"],
      ["base", "base: none"],
      { group: "as it was trained", options: trained },
    ]
    if (named.length) groups.push({ group: "named sets", options: named })
    fillSelect(byId("preset"), groups)
  }

  row(name, place) {
    const id = `weight-${place}`
    const slider = make("input", { type: "range", id, min: "0", max: String(SLIDER_MOST), step: "0.05" })
    const number = make("input", {
      type: "number",
      min: String(-MOST),
      max: String(MOST),
      step: "any",
      "aria-label": `Weight of ${name} as a number`,
    })
    const enter = (value, typing = null) => {
      if (!Number.isFinite(value) || Math.abs(value) > MOST) return
      this.weights.set(name, value)
      this.refresh(typing)
    }
    slider.addEventListener("input", () => enter(Number(slider.value)))
    number.addEventListener("input", () => enter(number.valueAsNumber, number))
    number.addEventListener("change", () => this.refresh())
    const label = make("label", { for: id, class: "task" }, make("span", { class: "dot" }), name)
    return { slider, number, element: make("div", { class: `slider task-${place % 8}` }, label, slider, number) }
  }

  /** @param typing the field whose text is left alone. */
  refresh(typing = null) {
    for (const [name, { slider, number, element }] of this.rows) {
      const weight = this.weights.get(name) ?? 0
      slider.value = String(Math.min(Math.max(weight, 0), SLIDER_MOST))
      slider.setAttribute("aria-valuetext", weight ? String(weight) : "off")
      if (number !== typing) number.value = String(weight)
      element.classList.toggle("off", !weight)
    }
    byId("mix-text").textContent = this.text
    this.changed()
  }
}
