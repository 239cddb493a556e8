// Task sets as text: math, math+nlu:0.5, base. As loraf/set_text.py reads them.

export const MOST = 16 // weights are from -16 to 16

/** The canonical text of weights, in the order of `tasks`. */
export function textOf(weights, tasks) {
  const parts = tasks.filter((name) => weights.get(name)).map((name) => {
    const weight = weights.get(name)
    return weight === 1 ? name : `${name}:${weight}`
  })
  return parts.join("+") || "base"
}

/** Task → weight of a text, or null if it is not made of these tasks (a named set, as_trained=…, a mistake). */
export function weightsOf(text, tasks) {
  if (text === "base") return new Map()
  if (text === "all") return new Map(tasks.map((name) => [name, 1]))
  const weights = new Map()
  for (const part of text.split("+")) {
    const [name, digits, ...more] = part.split(":")
    const weight = digits === undefined ? 1 : Number(digits)
    if (!tasks.includes(name) || weights.has(name) || more.length || digits === "") return null
    if (!Number.isFinite(weight) || Math.abs(weight) > MOST) return null
    weights.set(name, weight)
  }
  return weights
}

/** The name of a task that a text selects alone, or "". */
export function onlyTask(text, adapter) {
  if (text.startsWith("as_trained=")) return text.slice("as_trained=".length)
  const named = adapter?.sets.find((set) => set.name === text)
  if (named) return named.tasks?.length === 1 ? named.tasks[0].name : ""
  const weights = weightsOf(text, adapter ? adapter.tasks.map((task) => task.name) : [])
  return weights?.size === 1 ? [...weights.keys()][0] : ""
}

/** The model's name over HTTP: the adapter with a set of it, or the base model. */
export function modelName(adapter, text) {
  if (!adapter || text === "base") return "base"
  return `${adapter.name}@${text}`
}
