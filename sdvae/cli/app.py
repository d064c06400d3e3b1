"""`sdvae app`: a playground in the browser, for this machine alone."""

import click

from sdvae.cli.shared import DEVICE, VAES, Console, with_console
from sdvae.errors import ConfigError


@click.command(short_help="Try VAEs on your photos, in the browser.")
@VAES
@DEVICE
@click.option("--port", type=click.IntRange(0, 65535), default=7878, show_default=True, help="0 takes a free one.")
@click.option("--open", "is_opened", is_flag=True, help="Also open the page in the browser.")
@with_console
def app(vaes: tuple[str, ...], device: str, port: int, is_opened: bool, console: Console) -> None:
    """Serve a page on 127.0.0.1 that takes photos and shows what VAEs keep of them.

    It also shows latents, drift over round trips, ways between two photos and samples of the prior. Nothing leaves
    this machine.
    """
    try:
        from sdvae.app.server import HOST, bind, serve
    except ImportError as error:
        raise ConfigError(f"the app needs {error.name}; pip install 'sdvae[app]'") from error
    from sdvae.app.work import Playground
    from sdvae.vae import VAE

    playground = Playground([VAE.load(spec, device) for spec in vaes or (None,)])
    with bind(port) as listening:
        url = f"http://{HOST}:{listening.getsockname()[1]}"
        console.result(f"{url}  (Ctrl-C ends it)", url=url, vaes=playground.names)
        if is_opened:
            import webbrowser

            webbrowser.open(url)
        serve(playground, listening)
