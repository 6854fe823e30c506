"""The page: what is on it, and which of the `handlers` each button calls. The only module that needs Gradio."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from peft_surgical.errors import SurgicalError

from .handlers import LICENSES, TARGETS, Handlers, news_html, plan_html, problem_html, status_html, uploads_html
from .login import forget_login
from .runner import DONE, RUNNING, RunStatus
from .workspace import AppSettings

TITLE = "Surgical fine-tuning"
_INTRODUCTION = """# Surgical fine-tuning
Tune the right part of a pretrained network on your own photographs, see whether it is better than before, and take home
one small file."""
_STYLE = """
.gradio-container { width: 100% !important; max-width: min(62rem, 100vw) !important; margin: 0 auto !important; }
.gradio-container main, .gradio-container .column, .gradio-container .block, .gradio-container .html-container {
  min-width: 0; max-width: 100%;
}
.wide { overflow-x: auto; max-width: 100%; }
.wide table { border-collapse: collapse; font-size: .9rem; }
.wide td, .wide th { padding: .2rem 1rem .2rem 0 !important; text-align: left; white-space: nowrap; }
.wide table, .wide tr, .wide td, .wide th { border: 0 !important; }
.wide tr { border-bottom: 1px solid var(--border-color-primary) !important; }
.wide .confusion td, .wide .confusion th { padding: .25rem .5rem !important; text-align: center; min-width: 2.2rem; }
.wide .confusion td:first-child { white-space: normal; width: 9rem; }
.wide .confusion th[scope=col] { writing-mode: vertical-rl; transform: rotate(180deg); text-align: left; }
.wide .confusion th[scope=row] { text-align: right; }
.figure img { max-width: none; height: 22rem; background: #fff; }
.gate, .problem, .news { padding: .5rem .9rem; border-left: .4rem solid #8a8f98; margin: .3rem 0; }
.gate.yes { border-color: #1f7a4d; }
.gate.no { border-color: #a86b00; }
.problem { border-color: #b83228; }
.pictures { display: flex; flex-wrap: wrap; gap: .6rem; }
.pictures figure { width: 8rem; margin: 0; font-size: .8rem; overflow-wrap: anywhere; }
.beside { display: flex; flex-wrap: wrap; gap: 2rem; }
progress { width: 100%; height: 1rem; }
"""


def build_page(settings: AppSettings, cache: Path) -> tuple[gr.Blocks, Handlers]:
    """The page, not yet served, and its handlers, whose runner has to be closed in the end.

    Args:
        settings: What it offers.
        cache: Folder for files that are handed to the browser.
    """
    do = Handlers(settings, cache)
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        # Known by the browser alone, like a cookie; what it names is looked up in each handler.
        token = gr.BrowserState("", storage_key="peft-surgical", secret="peft-surgical")
        timer = gr.Timer(1.0, active=False)
        gr.Markdown(_INTRODUCTION)

        gr.Markdown("## 1. Photographs")
        with gr.Tabs():
            with gr.Tab("A zip file"):
                archive = gr.File(label="Zip file with one folder of photographs for each class", file_types=[".zip"])
            with gr.Tab("Class by class"):
                label = gr.Textbox(label="Class", placeholder="cat")
                images = gr.File(label="Photographs of this class", file_count="multiple", file_types=["image"])
                add_class = gr.Button("Add the photographs")
            with gr.Tab("A folder of this machine", visible=settings.folders is not None):
                folder = gr.Textbox(
                    label="Folder with one folder of photographs for each class",
                    info=f"Its path below {settings.folders}. It is used instead of what was sent.",
                )
        uploaded = gr.HTML()
        upload_news = gr.HTML()
        clear = gr.Button("Remove all photographs", size="sm")

        gr.Markdown("## 2. Network and plan")
        with gr.Row():
            model = gr.Dropdown(
                list(settings.models),
                value=settings.models[0] if settings.models else None,
                label="Network",
                info="Or another id of the Hub, of timm or transformers." if settings.any_model else None,
                allow_custom_value=settings.any_model or settings.folders is not None,
            )
            target = gr.Dropdown(
                list(TARGETS),
                value="auto",
                label="What to tune",
                info="auto compares parts of the network and finds the learning rate; or name blocks.",
                allow_custom_value=True,
            )
        with gr.Row():
            epochs = gr.Number(15, label="Epochs", precision=0, minimum=1)
            test = gr.Slider(
                0,
                0.5,
                0.2,
                step=0.05,
                label="Share of images for the test",
                info="They are looked at once, at the end.",
            )
        with gr.Accordion("More settings", open=False):
            lr = gr.Textbox(
                label="Learning rates", info="One or more; empty for the default.", placeholder="1e-3, 1e-4"
            )
            with gr.Row():
                batch_size = gr.Number(0, label="Batch size", info="0: by the number of images.", precision=0)
                image_size = gr.Number(0, label="Image size", info="In pixels; 0: the network's.", precision=0)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            skip_broken = gr.Checkbox(label="Leave out broken images")
        with gr.Row():
            ask = gr.Button("Show the plan")
            tune = gr.Button("Tune", variant="primary")
            stop = gr.Button("Stop", interactive=False)
        status = gr.HTML()
        plan = gr.HTML()
        candidates = gr.HTML()
        with gr.Accordion("What has happened", open=False):
            log = gr.Textbox(label="Progress", lines=8, max_lines=8, interactive=False)

        with gr.Column(visible=False) as found:
            gr.Markdown("## 3. Result")
            results = gr.HTML()
            gr.Markdown("### Take it home")
            download = gr.DownloadButton("Download the adapter (zip)", variant="primary", visible=False)
            with gr.Accordion("Compare base and tuned network on an image", open=False):
                image = gr.File(label="Image to compare on", file_types=["image"])
                compare = gr.Button("Compare")
                compared = gr.HTML()
            with gr.Accordion("Push the adapter to the Hub", open=False):
                repo = gr.Textbox(label="Repository", placeholder="me/my-adapter")
                licence = gr.Dropdown(list(LICENSES), value=LICENSES[0], label="Licence", allow_custom_value=True)
                datasets = gr.Textbox(label="Data sets", info="Their ids on the Hub; empty if they are not there.")
                private = gr.Checkbox(label="Private repository", value=True)
                own = "; empty for the one that this machine has logged in with" if settings.own_login else ""
                key = gr.Textbox(label="Token", type="password", info=f"It is used once, and not kept{own}.")
                push = gr.Button("Push")
                pushed = gr.HTML()

        running = [status, plan, candidates, log, ask, tune, stop, timer]
        ended = [found, results, download]

        def progress(visitor: str) -> dict[Any, Any]:
            now = do.status(visitor)
            ended = now is not None and now.kind == "tune" and now.state != RUNNING
            return progress_of(visitor, now) | (outcome_of(visitor, now) if ended else {})

        def progress_of(visitor: str, now: RunStatus | None) -> dict[Any, Any]:
            busy = now is not None and now.state == RUNNING
            return {
                status: status_html(now),
                plan: plan_html(now),
                candidates: do.candidates(visitor) if now is not None and now.kind == "tune" and busy else "",
                log: "\n".join(now.lines) if now is not None else "",
                ask: gr.Button(interactive=not busy),
                tune: gr.Button(interactive=not busy),
                stop: gr.Button(interactive=busy),
                timer: gr.Timer(active=busy),
            }

        def outcome_of(visitor: str, now: RunStatus | None) -> dict[Any, Any]:
            if now is not None and now.kind == "tune" and now.state != DONE:
                return {found: gr.Column(visible=False)}
            shown, file = do.results(visitor), do.download(visitor)
            there = gr.DownloadButton(value=file, visible=file is not None)
            return {found: gr.Column(visible=shown is not None), results: shown or "", download: there}

        def opened(visitor: str) -> dict[Any, Any]:
            workspace = do.workspaces.of(visitor)
            now = do.status(workspace.token)
            seen = progress_of(workspace.token, now) | outcome_of(workspace.token, now)
            return {token: workspace.token, uploaded: uploads_html(workspace), **seen}

        def begin(kind: str, visitor: str, *values: Any) -> dict[Any, Any]:
            try:
                do.start(visitor, kind, *values)
            except SurgicalError as error:
                return {status: problem_html(str(error))}
            hidden = {found: gr.Column(visible=False)} if kind == "tune" else {}
            return progress(visitor) | hidden

        def halt(visitor: str) -> dict[Any, Any]:
            do.stop(visitor)
            return {status: news_html("Stopping."), stop: gr.Button(interactive=False)}

        quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        given = [token, folder, model, target, epochs, test, lr, batch_size, image_size, skip_broken, seed]
        page.load(opened, [token], [token, uploaded, *running, *ended], **quiet)
        timer.tick(progress, [token], [*running, *ended], **quiet)
        ask.click(functools.partial(begin, "plan"), given, [*running, *ended], **quiet)
        tune.click(functools.partial(begin, "tune"), given, [*running, *ended], **quiet)
        stop.click(halt, [token], [status, stop], **quiet)

        waiting: dict[str, Any] = {"api_visibility": "private", "show_progress": "minimal"}
        archive.upload(_mended(do.add_archive, 2), [token, archive], [upload_news, uploaded], **waiting)
        add_class.click(_mended(do.add_images, 2), [token, label, images], [upload_news, uploaded], **waiting)
        clear.click(_mended(do.clear, 2), [token], [upload_news, uploaded], **waiting)
        compare.click(_mended(do.compare), [token, image], [compared], **waiting)
        push.click(_mended(do.push), [token, repo, licence, datasets, private, key], [pushed], **waiting)
    page.queue(default_concurrency_limit=8, max_size=100)
    return page, do


def _mended(handler: Callable[..., Any], outputs: int = 1) -> Callable[..., Any]:
    """The handler, whose errors of this package are shown in the first of its outputs, and change no other."""

    def called(*values: Any) -> Any:
        try:
            return handler(*values)
        except SurgicalError as error:
            shown = problem_html(str(error))
            return shown if outputs == 1 else (shown, *[gr.skip()] * (outputs - 1))

    return called


def serve_page(
    settings: AppSettings, host: str | None = "127.0.0.1", port: int | None = None, show: bool = False
) -> None:
    """Serve the page until Ctrl-C; a run that is going on is stopped then, and can be gone on with.

    Args:
        settings: What it offers.
        host: Address to listen on; None leaves it to Gradio's environment variables, as a Space sets them.
        port: None for the first free one from 7860 on.
        show: Whether to open the page in the browser.
    """
    if not settings.own_login:
        forget_login()
    with tempfile.TemporaryDirectory(prefix="peft-surgical-page-") as cache:
        os.environ |= {"GRADIO_TEMP_DIR": cache, "GRADIO_ANALYTICS_ENABLED": "False"}
        page, do = build_page(settings, Path(cache))
        try:
            how = {"server_name": host, "server_port": port, "inbrowser": show}
            _, address, _ = launch(page, settings, **how, prevent_thread_lock=True, quiet=True)
            print(f"The page is at {address} - Ctrl-C ends it.", flush=True)
            page.block_thread()
        finally:
            do.runner.close()


def launch(page: gr.Blocks, settings: AppSettings, **how: Any) -> Any:
    """Start the server of a page: no public link, no interface for other programs, nothing from elsewhere."""
    # Fonts of no web service; and colours in which small texts and white words on buttons can be read.
    theme = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
    )
    return page.launch(
        share=False,
        max_file_size=settings.limits.total_bytes,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        theme=theme,
        css=_STYLE,
        **how,
    )
