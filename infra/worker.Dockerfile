# docker build -f infra/worker.Dockerfile -t cbtm-worker .
# docker run --gpus all -v cbtm-cache:/home/cbtm/cache cbtm-worker --coordinator HOST:PORT --token TOKEN
FROM python:3.11-slim
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY common common
COPY coordinator coordinator
COPY worker worker
COPY client client
RUN pip install --no-cache-dir -c constraints.txt '.[worker]' && useradd --create-home --uid 10001 cbtm \
    && mkdir /home/cbtm/cache && chown cbtm /home/cbtm/cache
USER cbtm
ENV CBTM_CACHE_DIR=/home/cbtm/cache
VOLUME /home/cbtm/cache
# Stopped with SIGTERM, it saves, uploads and gives its task back: allow it the time (docker stop -t 600).
STOPSIGNAL SIGTERM
ENTRYPOINT ["cbtm-worker", "join"]
