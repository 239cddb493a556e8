"""The task mixer: the page that the HTTP door serves at `/`, with its files below `/page/`.

    index.html   the controls and their names
    style.css    light and dark
    main.js      connects the parts        ──▶  api.js     requests, token, streams, errors
    mixer.js     a slider a task                sets.js    sets as text
    answers.js   answers side by side           diff.js    where two answers differ
    report.js    forgetting, mask map           calls.js   the same call for other clients
    view.js      the view in the address        parts.js   small pieces of HTML
    settings.js  the reader's token and colours

Static files without a build step, which load nothing from other hosts and hold no inline script or style. Answers enter
the page as text only. No Python belongs here.
"""
