// The view in the address, so that a link reproduces it. The token is never part of it.

/** Reads the view from a fragment; what is missing or malformed is left out. */
export function read(fragment) {
  const fields = new URLSearchParams(fragment.replace(/^#/, ""))
  const number = (name, low, high) => {
    const value = Number(fields.get(name))
    return fields.get(name) && value >= low && value <= high ? value : null
  }
  return {
    adapter: fields.get("adapter"),
    mix: fields.get("mix"),
    pins: fields.has("pins") ? fields.getAll("pins").filter(Boolean) : null,
    question: fields.get("q"),
    form: fields.get("as"),
    maxTokens: number("max", 1, 100_000),
    temperature: number("t", 0, 2),
  }
}

export function write(view) {
  const fields = new URLSearchParams({ mix: view.mix })
  if (view.adapter) fields.set("adapter", view.adapter)
  for (const pin of view.pins.length ? view.pins : [""]) fields.append("pins", pin)
  fields.set("as", view.form)
  fields.set("max", view.maxTokens)
  fields.set("t", view.temperature)
  fields.set("q", view.question)
  return `#${fields}`
}
