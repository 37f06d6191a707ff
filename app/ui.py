"""The window's page: theme, header, and the screens in the order a person walks them, as Gradio blocks on the server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from app.page_door import PageDoor

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio import Blocks
    from gradio.themes import Base

WEB = Path(__file__).parent / "web"
SCREENS = ("home", "images", "recipe", "train", "studio", "blend", "compare")
"""In the order a person walks them. Each is web/NAME.js, which fills the element that it is given, and web/NAME.css."""


def mount_screens(app: FastAPI) -> None:
    """Puts the page at / of an application that has its routes already: a mount there takes all that is left."""
    import gradio as gr
    from fastapi.staticfiles import StaticFiles
    from starlette.routing import Mount

    app.mount("/web", StaticFiles(directory=WEB), name="web")
    sheets = "".join(f'<link rel="stylesheet" href="/web/{path.name}">' for path in sorted(WEB.glob("*.css")))
    # The browser fetches the modules while Gradio's own page is still being built.
    modules = "".join(f'<link rel="modulepreload" href="/web/{path.name}">' for path in sorted(WEB.glob("*.js")))
    gr.mount_gradio_app(
        app,
        make_page(),
        path="/",
        theme=make_theme(),
        head=f'<meta name="viewport" content="width=device-width, initial-scale=1">{sheets}{modules}',
        favicon_path=str(WEB / "icon.svg"),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,  # needs Node
        pwa=True,
        allowed_paths=[],
        max_file_size="1mb",  # pictures come by our own route
        show_error=True,
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount), "Gradio is mounted last"
    mounted.app = PageDoor(mounted.app)


def make_page() -> Blocks:
    """All screens at once; the address says which is seen. Gradio keeps no state: a reload or a second tab loses nothing."""
    import gradio as gr

    page = gr.Blocks(analytics_enabled=False, title="Impasto", fill_width=True)
    with page:
        gr.HTML(js_on_load=_fill("shell"), html_template=_EMPTY, elem_id="shell", apply_default_css=False)
        for name in SCREENS:
            with gr.Column(elem_id=f"screen-{name}", elem_classes="screen"):
                gr.HTML(js_on_load=_fill(name), html_template=_EMPTY, apply_default_css=False)
    return page


_EMPTY = '<div class="piece"></div>'


def _fill(name: str) -> str:
    """What Gradio runs once the element is in the page."""
    return f'import("/web/{name}.js").then((module) => module.mount(element.querySelector(".piece")));'


def make_theme() -> Base:
    """Paper and vermilion. Of the fonts that Gradio ships, those whose files are whole in both weights."""
    import gradio as gr
    from gradio.themes.utils.fonts import LocalFont

    sans, mono = LocalFont("IBM Plex Sans", weights=(400, 700)), LocalFont("IBM Plex Mono", weights=(400, 700))
    return gr.themes.Base(
        primary_hue=gr.themes.colors.orange,
        neutral_hue=gr.themes.colors.stone,
        font=[sans, "system-ui", "sans-serif"],
        font_mono=[mono, "ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        body_text_color_subdued="#57534e",  # 7:1 on paper
        body_text_color_subdued_dark="#b5afa8",
        body_background_fill="#faf8f5",
        body_background_fill_dark="#1a1817",
        block_background_fill="#ffffff",
        block_background_fill_dark="#242120",
        background_fill_secondary="#f1ede7",
        background_fill_secondary_dark="#2d2a28",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1a1817",
    )
