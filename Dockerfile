# The image of tokenauth. Build: docker build -t tokenauth . Run: docs/production.md#containers

ARG PYTHON=3.13

FROM python:${PYTHON}-slim AS build
WORKDIR /source
COPY requirements-serve.lock ./
RUN python -m venv /opt/tokenauth \
    && /opt/tokenauth/bin/pip install --no-cache-dir --require-hashes -r requirements-serve.lock
COPY pyproject.toml README.md LICENSE ./
COPY migrations migrations
COPY tokenauth tokenauth
RUN /opt/tokenauth/bin/pip install --no-cache-dir --no-deps --no-build-isolation . \
    && /opt/tokenauth/bin/pip uninstall --yes editables hatchling pathspec pluggy trove-classifiers pip \
    && python -m compileall -q -j 0 /opt/tokenauth

FROM python:${PYTHON}-slim
RUN groupadd --gid 10001 tokenauth \
    && useradd --uid 10001 --gid tokenauth --home-dir /data --no-create-home --shell /usr/sbin/nologin tokenauth \
    && install -d -o tokenauth -g tokenauth -m 0700 /data
COPY --from=build /opt/tokenauth /opt/tokenauth
ENV PATH=/opt/tokenauth/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    TOKENAUTH_CONFIG=/data/config.toml
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s CMD ["tokenauth", "health"]
ENTRYPOINT ["tokenauth"]
CMD ["serve", "--host", "0.0.0.0"]
