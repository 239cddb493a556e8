// What belongs to the reader: the token of this tab, and light or dark.

import { token } from "./api.js"
import { byId } from "./parts.js"

const THEME_KEY = "loraf-theme"

/** Asks for a token. Returns whether one was given. */
export function askForToken(why = "") {
  const dialog = byId("token-dialog")
  byId("token-why").textContent = `${why} It stays in this tab and is never part of a link.`.trim()
  byId("token").value = ""
  return new Promise((resolve) => {
    const submitted = (event) => {
      event.preventDefault()
      token.set(byId("token").value.trim())
      close(true)
    }
    const cancelled = () => close(false)
    const close = (given) => {
      byId("token-form").removeEventListener("submit", submitted)
      byId("token-cancel").removeEventListener("click", cancelled)
      dialog.removeEventListener("cancel", cancelled)
      dialog.close()
      byId("token").value = ""
      resolve(given)
    }
    byId("token-form").addEventListener("submit", submitted)
    byId("token-cancel").addEventListener("click", cancelled)
    dialog.addEventListener("cancel", cancelled)
    dialog.showModal()
    byId("token").focus()
  })
}

/** Follows the control for colours, and the system where it says so. @param changed called when colours change. */
export function followTheme(changed) {
  const select = byId("theme")
  const apply = () => {
    if (select.value) document.documentElement.dataset.theme = select.value
    else delete document.documentElement.dataset.theme
    changed()
  }
  select.value = localStorage.getItem(THEME_KEY) ?? ""
  select.addEventListener("change", () => {
    localStorage.setItem(THEME_KEY, select.value)
    apply()
  })
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", changed)
  apply()
}
