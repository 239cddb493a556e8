"""`loraf-client chat`: a conversation in the terminal, whose task set may change with every question.

    run          reads lines, answers questions, obeys commands; keeps going after an error
    commands     what a line that begins with / does
    conversation the turns so far, and how they are saved
    asking       one question under one set: as a chat, else in the task's template, else as a plain prompt
    sets         a set as it is typed, checked against the loaded adapter
    keyboard     where lines come from: an editor with history, or a pipe
    screen       answers, notes and answers side by side; shows no control character of an answer

Knows the server only through `loraf_serve.client`.
"""
