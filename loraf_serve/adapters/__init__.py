"""The checkpoints that a server holds: named at start or loaded later, checked, replaced, unloaded.

`registry` reads and names them, `library` changes them while the server runs, `root` keeps paths below
--adapter-root. No gRPC message enters here.
"""
