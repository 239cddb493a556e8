"""The checkpoints that a server holds: named at start or loaded later, checked, replaced, unloaded.

    adapter_spec       --adapter [NAME=]CKPT[@task+task]          ─┐
    root               paths below --adapter-root, from clients   ─┴▶ checkpoint_folder (checks, then values)
    registry           what each name means now
    library            loads, replaces and unloads while requests run

No gRPC message enters here.
"""
