// Where two answers differ, word by word.

const MOST_CELLS = 4_000_000 // of the table; longer answers are compared at their beginnings and ends only

/** Splits a text into words with the white space that follows them. Joined, they are the text. */
export function words(text) {
  return text.match(/\s*\S+\s*|\s+/g) ?? []
}

/** For each word of `text` whether it is also in `reference`, in the same order (longest common subsequence). */
export function marks(reference, text) {
  const a = words(reference).map((word) => word.trim())
  const own = words(text)
  const b = own.map((word) => word.trim())
  let start = 0
  while (start < a.length && start < b.length && a[start] === b[start]) start += 1
  let end = 0
  while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end += 1
  const same = b.map((_, i) => i < start || i >= b.length - end)
  const [left, right] = [a.slice(start, a.length - end), b.slice(start, b.length - end)]
  if (left.length * right.length <= MOST_CELLS) {
    for (const i of common(left, right)) same[start + i] = true
  }
  return own.map((word, i) => ({ word, same: same[i] }))
}

/** How many words of `reference` are missing from `text`. */
export function missing(reference, text) {
  return words(reference).length - marks(reference, text).filter((mark) => mark.same).length
}

/** Places in `b` of a longest common subsequence. */
function common(a, b) {
  const width = b.length + 1
  const lengths = new Uint32Array((a.length + 1) * width)
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i * width + j] =
        a[i] === b[j]
          ? lengths[(i + 1) * width + j + 1] + 1
          : Math.max(lengths[(i + 1) * width + j], lengths[i * width + j + 1])
    }
  }
  const places = []
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) {
      places.push(j)
      i += 1
      j += 1
    } else if (lengths[(i + 1) * width + j] >= lengths[i * width + j + 1]) i += 1
    else j += 1
  }
  return places
}
