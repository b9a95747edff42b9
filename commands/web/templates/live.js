// Keeps a page live: on an event of the server it loads the page again and replaces its content.
// A page that is being typed into, or is hidden, stays as it is. Without this script the link
// "reload" does the same.
"use strict";
(() => {
  const button = document.getElementById("live");
  if (!button || !window.EventSource) return;
  const key = "qmqp-relay live";
  const RETRY = 5000;  // milliseconds
  let source = null;
  let waits = false;
  let timer = 0;

  const remembered = () => {
    try { return localStorage.getItem(key) !== "off"; } catch { return true; }
  };
  const remember = (on) => {
    try { localStorage.setItem(key, on ? "on" : "off"); } catch { /* it is forgotten */ }
  };
  const show = (text) => {
    button.textContent = text;
    button.setAttribute("aria-checked", String(source !== null));
  };
  const busy = () =>
    document.hidden || document.activeElement?.matches("main input, main select, main textarea");

  // Where the focus is, so that it is there again afterwards.
  const focusable = "a[href], button, summary, input, select, textarea";
  const place = (main) => [...main.querySelectorAll(focusable)].indexOf(document.activeElement);

  const replace = (text) => {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const main = document.getElementById("main");
    const next = fresh.getElementById("main");
    if (!next || fresh.body.dataset.page !== document.body.dataset.page) return stop("Live: ended");
    const open = [...main.querySelectorAll("details")].map((one) => one.open);
    const focused = place(main);
    main.replaceChildren(...next.childNodes);
    main.querySelectorAll("details").forEach((one, n) => { if (n in open) one.open = open[n]; });
    if (focused >= 0) main.querySelectorAll(focusable)[focused]?.focus({ preventScroll: true });
    document.title = fresh.title;
    document.body.dataset.loads = Number(document.body.dataset.loads ?? 0) + 1;
  };

  // Shows a failure, and tries again a little later.
  const again = () => {
    show("Live: waiting");
    clearTimeout(timer);
    timer = setTimeout(() => {
      if (source.readyState === EventSource.CLOSED) start(false);
      load();
    }, RETRY);
  };

  const load = async () => {
    if (busy()) { waits = true; return; }
    waits = false;
    try {
      const answer = await fetch(location.href, { redirect: "manual", cache: "no-store" });
      if (source === null) return;
      if (answer.type === "opaqueredirect") location.reload();  // the session has ended
      else if (answer.ok) {
        replace(await answer.text());
        if (source?.readyState === EventSource.OPEN) show("Live: on");
      } else again();
    } catch { if (source !== null) again(); }
  };

  const stop = (text) => {
    clearTimeout(timer);
    source?.close();
    source = null;
    show(text);
  };
  // `first`: the page has just been loaded, and the first event says nothing new.
  const start = (first) => {
    source = new EventSource("/events");
    source.onmessage = () => { if (first) first = false; else load(); };
    source.onopen = () => show("Live: on");
    source.onerror = () => {
      show("Live: waiting");
      // A browser tries again after a broken connection, and never after an answer that is an error.
      if (source.readyState === EventSource.CLOSED) again();
    };
    source.addEventListener("ended", () => location.reload());
  };

  button.addEventListener("click", () => {
    if (source) stop("Live: off"); else { start(false); show("Live: on"); }
    remember(source !== null);
  });
  document.addEventListener("visibilitychange", () => { if (source && waits) load(); });
  document.addEventListener("focusout", () => setTimeout(() => { if (source && waits) load(); }));
  button.hidden = false;
  if (remembered()) { start(true); show("Live: on"); } else show("Live: off");
})();
