"""Forms of answers (structured output): keeps a form from harming anybody but the client that sent it.

    form_checker   the service's process: asks `trial` about each new form, before the engine sees it
    trial          a process of its own: compiles a form under limits of time and memory, and tries it
    keywords       which JSON schemas XGrammar keeps to
    budget         vLLM's engine core: ends an answer whose form takes too much time with each token

vLLM compiles and applies forms with XGrammar, which is native code: it can take any time, and a fault in it ends the
process.
"""
