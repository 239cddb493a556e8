// Small pieces of HTML. Text enters as text nodes only, so nothing that a model writes becomes markup.

/** Makes an element. `class`, `for`, `role`, `scope`, `aria-*` and `data-*` become attributes, the rest properties. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(properties)) {
    if (/^(class|for|role|scope|aria-|data-)/.test(name)) element.setAttribute(name, value)
    else element[name] = value
  }
  element.append(...children.filter((child) => child !== null && child !== ""))
  return element
}

export function byId(id) {
  return document.getElementById(id)
}

/** Copies a text and says so on the button for a moment. */
export function copyButton(text, label, name) {
  const button = make("button", { type: "button", class: "quiet", textContent: label, "aria-label": name })
  button.addEventListener("click", () => copy(text(), button, label))
  return button
}

export async function copy(text, button, label) {
  let done = "Copied"
  try {
    await navigator.clipboard.writeText(text)
  } catch {
    done = selectInstead(text) ? "Copied" : "Not allowed here"
  }
  button.textContent = done
  setTimeout(() => (button.textContent = label), 1500)
}

// Pages without TLS on another machine have no clipboard.
function selectInstead(text) {
  const area = make("textarea", { value: text, class: "unseen", "aria-hidden": "true" })
  document.body.append(area)
  const focused = document.activeElement
  area.select()
  const done = document.execCommand("copy")
  area.remove()
  focused?.focus()
  return done
}

/** Fills a select; `options` are [value, text] or {group, options}. Keeps the value where it is still there. */
export function fillSelect(select, options) {
  const before = select.value
  const option = ([value, text]) => make("option", { value, textContent: text })
  select.replaceChildren(
    ...options.map((entry) =>
      Array.isArray(entry) ? option(entry) : make("optgroup", { label: entry.group }, ...entry.options.map(option)),
    ),
  )
  if ([...select.options].some((each) => each.value === before)) select.value = before
}

/** The colour that a class of style.css gives to text, in the theme of this moment. */
export function colourOf(name) {
  const probe = make("span", { class: name, hidden: true })
  document.body.append(probe)
  const { color } = getComputedStyle(probe)
  probe.remove()
  return color
}
