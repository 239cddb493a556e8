// The call that this page sends, for other clients, quoted so that it can be pasted.

const VARIABLE = "LORAF_TOKEN"
const GRPC_PORT = 50051 // the default of loraf-serve --port

/** One argument for a POSIX shell. */
export function shell(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", `'\\''`)}'`
}

/** A literal of Python: JSON's strings and numbers are also Python's. */
export function python(value) {
  if (value === true) return "True"
  if (value === false) return "False"
  if (value === null) return "None"
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`
  if (typeof value === "object") {
    return `{${Object.entries(value).map(([key, each]) => `${python(key)}: ${python(each)}`).join(", ")}}`
  }
  return JSON.stringify(value)
}

export function curl(base, path, body, withToken) {
  const token = withToken ? ` \\\n  -H "Authorization: Bearer $${VARIABLE}"` : ""
  const fields = Object.entries(body).map(([name, value]) => `${JSON.stringify(name)}: ${JSON.stringify(value)}`)
  const json = `{${fields.join(",\n       ")}}`
  const address = shell(new URL(path, base).href)
  return `curl ${address} \\\n  -H 'Content-Type: application/json'${token} \\\n  -d ${shell(json)}`
}

export function openai(base, path, body, withToken) {
  const { apply_task_template: template, ...known } = body
  const key = withToken ? `os.environ[${python(VARIABLE)}]` : `"none"`
  const chat = path.includes("chat")
  const lines = Object.entries(known).map(([name, value]) => `    ${name}=${python(value)},`)
  if (template) lines.push(`    extra_body={"apply_task_template": True},`)
  return [
    ...(withToken ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${python(new URL("v1", base).href)}, api_key=${key})`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...lines,
    ")",
    `print(answer.choices[0].${chat ? "message.content" : "text"})`,
  ].join("\n")
}

/**
 * @param adapter its name; "" for none.
 * @param task the only task of the set; "" if there are several, or none.
 */
export function grpc(base, path, body, adapter, set, task) {
  const text = path.includes("chat") ? body.messages.at(-1).content : body.prompt
  const host = new URL(base).hostname
  const isHere = host === "127.0.0.1" || host === "localhost"
  const lines = [
    "loraf-client generate",
    set === "base" ? "--base" : `--adapter ${shell(adapter)} --tasks ${shell(set)}`,
    `--max-tokens ${body.max_tokens} --temperature ${body.temperature}`,
    body.apply_task_template ? (task ? "--task-template" : "") : path.includes("chat") ? "--chat" : "",
    isHere ? "" : `--server ${shell(`${host}:${GRPC_PORT}`)}`,
    text.startsWith("-") ? `-- ${shell(text)}` : shell(text),
  ]
  return lines.filter(Boolean).join(" \\\n  ")
}
